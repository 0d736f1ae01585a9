"""The objectives on the oracle's own log-prob sums give the oracle's losses and rewards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_longpo.objectives import PairLogps, build_objective
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


def pair_logps(pairs: list[PairSums]) -> PairLogps:
    """Pads the turns of each pair to the most of any, with numbers that must not count."""
    most = max(len(pair.policy_chosen) for pair in pairs)

    def padded(field: str) -> torch.Tensor:
        turns = [getattr(pair, field) for pair in pairs]
        return torch.tensor([one + [123.0] * (most - len(one)) for one in turns])

    mask_NT = torch.tensor(
        [[turn < len(pair.policy_chosen) for turn in range(most)] for pair in pairs]
    )
    return PairLogps(
        policy_chosen_NT=padded("policy_chosen"),
        policy_rejected_NT=padded("policy_rejected"),
        reference_chosen_NT=padded("reference_chosen"),
        reference_rejected_NT=padded("reference_rejected"),
        turn_mask_NT=mask_NT,
        nll_sum_N=torch.tensor([pair.nll_sum for pair in pairs]),
        nll_count_N=torch.tensor([pair.nll_count for pair in pairs]),
    )


@pytest.mark.parametrize("turns", ["summed", "per_turn"])
@pytest.mark.parametrize(
    ("name", "context", "nll_weight"), [("longpo", "short", 1.0), ("dpo", "long", 0.0)]
)
def test_preference_objectives(turns: str, name: str, context: str, nll_weight: float) -> None:
    rows = random_rows(np.random.default_rng(5), VOCAB, 4)
    assert len({len(row.reference_chosen) for row in rows}) > 1, "some turns must be absent"
    settings: dict[str, Any] = {
        "beta": 0.3,
        "preference_weight": 0.6,
        "nll_weight": nll_weight,
        "nll_scope": "chosen_row",
        "turns": turns,
        "label_smoothing": 0.15,
    }
    oracle = oracle_step(
        tiny_llama(0), tiny_llama(1), rows, name=name, reference_context=context, **settings
    )
    out = build_objective(name, **settings)(pair_logps(oracle.pairs))
    assert out.loss_N.tolist() == pytest.approx([pair.loss for pair in oracle.pairs], rel=1e-5)
    assert out.preference_loss_N is not None
    assert out.chosen_rewards_N is not None and out.rejected_rewards_N is not None
    for values_N, key in (
        (out.preference_loss_N, "preference_loss"),
        (out.chosen_rewards_N, "rewards/chosen"),
        (out.rejected_rewards_N, "rewards/rejected"),
        ((out.chosen_rewards_N > out.rejected_rewards_N).float(), "rewards/accuracies"),
    ):
        assert float(values_N.mean()) == pytest.approx(oracle.metrics[key], rel=1e-5)


@pytest.mark.parametrize("name", ["sft", "sft_rejected"])
def test_sft(name: str) -> None:
    rows = random_rows(np.random.default_rng(6), VOCAB, 3)
    settings: dict[str, Any] = {
        "preference_weight": 0.0,
        "nll_weight": 0.5,
        "nll_scope": "chosen_answers",
        "turns": "summed",
        "label_smoothing": 0.0,
    }
    oracle = oracle_step(tiny_llama(0), None, rows, name=name, **settings)
    out = build_objective(name, beta=None, **settings)(pair_logps(oracle.pairs))
    assert float(out.loss_N.mean()) == pytest.approx(oracle.loss, rel=1e-5)
