"""Objectives: pure tensor functions from log-prob sums to a loss a pair.

This package imports torch and nothing else of ours, so a new objective can be read and tested
without a model. docs/objectives.md tells how to add one.
"""

from __future__ import annotations

from typing import Any

from .dpo import DPO
from .longpo import LongPO
from .sft import SFT
from .types import Branch, LossOutput, Needs, NllScope, Objective, PairLogps, Turns

__all__ = ["OBJECTIVES", "LossOutput", "Needs", "Objective", "PairLogps", "build_objective"]

OBJECTIVES = ("longpo", "dpo", "sft", "sft_rejected")
"""Names that `build_objective` knows."""


def build_objective(
    name: str,
    *,
    beta: float | None,
    preference_weight: float,
    nll_weight: float,
    nll_scope: NllScope,
    turns: Turns,
    label_smoothing: float,
) -> Objective:
    """Returns the objective of `objective.name`; settings that contradict it are a ValueError.

    `beta` may be None where the objective has no preference term.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective.name ({name}): use one of {', '.join(OBJECTIVES)}")
    if preference_weight < 0 or nll_weight < 0:
        raise ValueError(
            f"objective.preference_weight ({preference_weight}) and objective.nll_weight "
            f"({nll_weight}) must not be negative"
        )
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"objective.label_smoothing ({label_smoothing}) must be in [0, 0.5)")
    if turns not in ("summed", "per_turn"):
        raise ValueError(f"objective.turns ({turns}): use summed or per_turn")
    if nll_scope not in ("chosen_row", "chosen_answers"):
        raise ValueError(f"objective.nll_scope ({nll_scope}): use chosen_row or chosen_answers")
    settings: dict[str, Any] = {
        "preference_weight": preference_weight,
        "nll_weight": nll_weight,
        "nll_scope": nll_scope,
        "turns": turns,
        "label_smoothing": label_smoothing,
    }
    if name in ("sft", "sft_rejected"):
        _check_sft(name, preference_weight, nll_weight, nll_scope)
        branch: Branch = "chosen" if name == "sft" else "rejected"
        return SFT(beta=0.0, branch=branch, **settings)
    if preference_weight == nll_weight == 0:
        raise ValueError(
            f"objective.preference_weight and objective.nll_weight are both 0: {name} has nothing "
            "to train. Set one of them above 0"
        )
    if beta is None or beta <= 0:
        raise ValueError(f"objective.beta ({beta}): {name} needs a number above 0")
    objective_class = LongPO if name == "longpo" else DPO
    return objective_class(beta=beta, **settings)


def _check_sft(name: str, preference_weight: float, nll_weight: float, nll_scope: str) -> None:
    if preference_weight:
        raise ValueError(
            f"objective.preference_weight ({preference_weight}): {name} has no preference term. "
            "Set it to 0, or use objective.name longpo or dpo"
        )
    if not nll_weight:
        raise ValueError(f"objective.nll_weight ({nll_weight}): {name} trains by NLL alone. Set 1")
    if name == "sft_rejected" and nll_scope != "chosen_answers":
        raise ValueError(
            f"objective.nll_scope ({nll_scope}): sft_rejected trains the rejected answers alone. "
            "Use chosen_answers, which means the trained branch's answers here"
        )
