"""The metrics' names that the contract fixes, and which names are parts of a loss."""

from __future__ import annotations

from collections.abc import Iterable

LOSS_KEYS = (
    "loss",
    "preference_loss",
    "nll_loss",
    "logps/chosen",
    "logps/rejected",
    "reference_logps/chosen",
    "reference_logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
)
"""Means over a global batch's pairs that every row has; null where the objective gives none."""


def loss_parts(names: Iterable[str]) -> list[str]:
    """Returns the names of a loss's parts, those of the contract first and in its order."""
    found = {name for name in names if name.endswith("_loss")}
    contract = [name for name in LOSS_KEYS if name in found]
    return [*contract, *sorted(found.difference(contract))]
