"""Five steps with clipping, shuffling and a new epoch end at the oracle's weights."""

from __future__ import annotations

from typing import Literal

import pytest

from megatron_longpo.parallel.groups import Groups
from tests.parity.cases import LORA
from tests.parity.harness import Shelf
from tests.parity.steps import Steps, compare_steps, oracle_steps, our_steps


@pytest.mark.parametrize(
    ("name", "distributed", "weight_decay"),
    [("rmsprop", True, 0.0), ("rmsprop", False, 0.1), ("adam", True, 0.1), ("adam", False, 0.0)],
)
def test_weights_after_five_steps_are_the_oracles(
    name: Literal["rmsprop", "adam"],
    distributed: bool,
    weight_decay: float,
    shelf: Shelf,
    single_process: Groups,
) -> None:
    steps = Steps(optimizer=name, distributed=distributed, weight_decay=weight_decay)
    compare_steps(our_steps(steps, shelf), oracle_steps(steps, shelf))


@pytest.mark.parametrize("name", ["rmsprop", "adam"])
def test_adapters_after_five_steps_are_pefts(
    name: Literal["rmsprop", "adam"], shelf: Shelf, single_process: Groups
) -> None:
    steps = Steps(optimizer=name, weight_decay=0.1, lora=LORA)
    compare_steps(our_steps(steps, shelf), oracle_steps(steps, shelf))
