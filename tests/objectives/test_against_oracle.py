"""The objectives on the oracle's own log-prob sums give the oracle's losses and rewards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_longpo.objectives import OBJECTIVES, PairLogps, build_objective
from tests.objectives.logps import pair_logps
from tests.oracle import PairSums, oracle_step
from tests.random_rows import random_rows

VOCAB = 32


def tiny_llama(seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval()


def logps_of(pairs: list[PairSums]) -> PairLogps:
    """Pads the turns of each pair to the most of any, with numbers that must not count."""
    most = max(len(sums) for pair in pairs for sums in (*pair.policy.values(), [0.0]))

    def padded(field: str) -> dict[str, torch.Tensor]:
        rows: dict[str, list[list[float]]] = {}
        for pair in pairs:
            for key, sums in getattr(pair, field).items():
                rows.setdefault(key, []).append([*sums, *[123.0] * (most - len(sums))])
        return {key: torch.tensor(values, dtype=torch.float64) for key, values in rows.items()}

    def sums_and_counts(field: str) -> tuple[torch.Tensor, list[int]]:
        sums = torch.tensor([getattr(pair, f"{field}_sum") for pair in pairs], dtype=torch.float64)
        return sums, [getattr(pair, f"{field}_count") for pair in pairs]

    turns = [len(next(iter(pair.policy.values()), [0.0])) for pair in pairs]
    return pair_logps(
        [[turn < count for turn in range(most)] for count in turns],
        policy=padded("policy"),
        reference=padded("reference"),
        token_counts=padded("token_counts"),
        nll=sums_and_counts("nll"),
        divergence=sums_and_counts("divergence"),
    )


SETTINGS: dict[str, dict[str, Any]] = {
    "longpo": {"nll_weight": 1.0, "nll_scope": "chosen_row", "label_smoothing": 0.15},
    "dpo": {"label_smoothing": 0.15},
    "ipo": {"nll_weight": 0.3, "nll_scope": "chosen_row", "answer_nll_weight": 0.4},
    "simpo": {"gamma": 0.7, "label_smoothing": 0.15},
    "orpo": {"nll_weight": 1.0},
    "sft": {"nll_weight": 0.5},
    "sft_rejected": {"nll_weight": 0.5},
    "sft_short_to_long": {"nll_weight": 1.0, "divergence_weight": 0.4},
    "solopo_dpo": {"alignment_weight": 3.0, "label_smoothing": 0.15},
    "solopo_simpo": {"alignment_weight": 0.6, "gamma": 0.7, "answer_nll_weight": 0.4},
    "solopo_orpo": {"alignment_weight": 0.6, "nll_weight": 1.0},
    "opsdl": {"divergence_weight": 0.4, "divergence_scope": "rejected_answers"},
}


@pytest.mark.parametrize("turns", ["summed", "per_turn"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective(name: str, turns: str) -> None:
    rows = random_rows(np.random.default_rng(5), VOCAB, 4)
    assert len({len(row.reference_chosen) for row in rows}) > 1, "some turns must be absent"
    settings: dict[str, Any] = {
        "beta": 0.3,
        "preference_weight": 0.6,
        "nll_weight": 0.0,
        "nll_scope": "chosen_answers",
        "answer_nll_weight": 0.0,
        "turns": turns,
        "label_smoothing": 0.0,
        "gamma": 0.0,
        "alignment_weight": 0.0,
        "divergence_weight": 0.0,
        "divergence_scope": "chosen_answers",
        "reference_context": "long" if name in ("dpo", "ipo") else "short",
        **SETTINGS[name],
    }
    oracle = oracle_step(tiny_llama(0), tiny_llama(1), rows, name=name, **settings)
    out = build_objective(name, settings)(logps_of(oracle.pairs))
    assert out.loss_N.tolist() == pytest.approx([pair.loss for pair in oracle.pairs], rel=1e-9)
    for key in (
        "preference_loss",
        "nll_loss",
        "answer_nll_loss",
        "alignment_loss",
        "divergence_loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
    ):
        assert (key in out.metrics) == (key in oracle.metrics), key
        if key in out.metrics:
            mean = float(out.metrics[key].double().mean())
            assert mean == pytest.approx(oracle.metrics[key], rel=1e-9), key
