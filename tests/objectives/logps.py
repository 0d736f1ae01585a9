"""Log-prob sums for objectives, of which a test says only what it is about."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_longpo.objectives import Objective, PairLogps, build_objective

DEFAULTS: dict[str, Any] = {
    "beta": 0.5,
    "preference_weight": 1.0,
    "nll_weight": 0.0,
    "nll_scope": "chosen_answers",
    "answer_nll_weight": 0.0,
    "turns": "summed",
    "label_smoothing": 0.0,
    "gamma": 0.0,
    "alignment_weight": 1.0,
    "divergence_weight": 1.0,
    "divergence_scope": "rejected_answers",
}


def objective(name: str = "longpo", **settings: Any) -> Objective:
    """`name` with the defaults above, the reference reading long rows for dpo and ipo alone."""
    context = "long" if name in ("dpo", "ipo") else "short"
    return build_objective(name, {"reference_context": context, **DEFAULTS, **settings})


def pair_logps(
    mask: list[list[bool]] | Tensor,
    *,
    policy: dict[str, Tensor] | None = None,
    reference: dict[str, Tensor] | None = None,
    token_counts: dict[str, Tensor] | None = None,
    nll: tuple[Tensor, list[int]] | None = None,
    divergence: tuple[Tensor, list[int]] | None = None,
) -> PairLogps:
    """`nll` and `divergence` are sums and counts; both are 0 of 0 tokens where left out."""
    mask_NT = torch.as_tensor(mask)
    nothing = (torch.zeros(len(mask_NT), dtype=torch.float64), [0] * len(mask_NT))
    nll_sum_N, nll_count = nll or nothing
    divergence_sum_N, divergence_count = divergence or nothing
    rows: Any = policy or {}
    references: Any = reference or {}
    counts: Any = token_counts or {}
    return PairLogps(
        policy=rows,
        reference=references,
        token_counts=counts,
        turn_mask_NT=mask_NT,
        nll_sum_N=nll_sum_N,
        nll_count_N=torch.tensor(nll_count),
        divergence_sum_N=divergence_sum_N,
        divergence_count_N=torch.tensor(divergence_count),
    )
