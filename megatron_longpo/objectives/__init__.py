"""Objectives: pure tensor functions from log-prob sums to a loss of each pair.

This package imports torch, and of ours the names in config/names.py, so a new objective can be read
and tested without a model. docs/objectives.md says how to add one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .dpo import DPO
from .ipo import IPO
from .longpo import LongPO
from .opsdl import OPSDL
from .orpo import ORPO
from .sft import SFT, ConstrainedSFT
from .simpo import SimPO
from .solopo import SoLoDPO, SoLoORPO, SoLoSimPO
from .types import LossOutput, Needs, Objective, PairLogps

__all__ = [
    "OBJECTIVES",
    "LossOutput",
    "Needs",
    "Objective",
    "PairLogps",
    "build_objective",
]

OBJECTIVES: dict[str, tuple[type[Objective], dict[str, Any]]] = {
    "longpo": (LongPO, {}),
    "dpo": (DPO, {}),
    "ipo": (IPO, {}),
    "simpo": (SimPO, {}),
    "orpo": (ORPO, {}),
    "sft": (SFT, {"branch": "chosen"}),
    "sft_rejected": (SFT, {"branch": "rejected"}),
    "sft_short_to_long": (ConstrainedSFT, {}),
    "solopo_dpo": (SoLoDPO, {}),
    "solopo_simpo": (SoLoSimPO, {}),
    "solopo_orpo": (SoLoORPO, {}),
    "opsdl": (OPSDL, {}),
}
"""`objective.name` -> its class, and the fields that the name fixes."""


def build_objective(name: str, keys: Mapping[str, Any]) -> Objective:
    """Returns the objective of `objective.name`.

    `keys` are the resolved keys of the section `objective` and `reference_context`. The objective
    takes those that it has a field for. The config has checked that they fit together.
    """
    objective_class, fixed = OBJECTIVES[name]
    names = {field.name for field in dataclasses.fields(objective_class)}
    return objective_class(
        **{key: value for key, value in keys.items() if key in names - fixed.keys()}, **fixed
    )
