"""Learning rates of a run, step by step, and what the optimizer is given."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from megatron_longpo.config.train import OptimizerConfig
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.training import loop
from megatron_longpo.training.optimizer import current_learning_rate, make_scheduler
from tests.parity.harness import Shelf
from tests.training.short_runs import CASE, short_config


class FakeOptimizer:
    """Param groups alone, which is all that a schedule sees."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": 0.0, "weight_decay": 0.0}]


def rates(config: OptimizerConfig, num_steps: int) -> list[float]:
    optimizer: Any = FakeOptimizer()
    scheduler = make_scheduler(config, optimizer, num_steps=num_steps)
    found = []
    for _ in range(num_steps):
        found.append(current_learning_rate(optimizer))
        scheduler.step(increment=1)
    return found


def transformers_rates(name: str, lr: float, warmup_steps: int, num_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=num_steps
    )
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant_with_warmup")],
)
@pytest.mark.parametrize(("ratio", "num_steps", "warmup_steps"), [(0.1, 25, 3), (0.0, 7, 0)])
def test_rates_are_those_of_transformers(
    schedule: Any, theirs: str, ratio: float, num_steps: int, warmup_steps: int
) -> None:
    config = OptimizerConfig(lr=2e-3, lr_schedule=schedule, warmup_ratio=ratio)
    expected = transformers_rates(theirs, 2e-3, warmup_steps, num_steps)
    assert rates(config, num_steps) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_the_lowest_rate_is_approached() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.2, lr_schedule="linear", warmup_ratio=0.0)
    assert rates(config, 4) == pytest.approx([1.0, 0.8, 0.6, 0.4])


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_a_single_step_runs_at_the_full_rate(ratio: float) -> None:
    """However long the warm-up: a run of one step must train."""
    assert rates(OptimizerConfig(lr=3e-4, warmup_ratio=ratio), 1) == [3e-4]


@pytest.mark.parametrize(("clip_grad", "expected"), [(0.0, math.inf), (0.7, 0.7)])
def test_clipping_may_be_off_and_the_norm_is_still_logged(
    clip_grad: float, expected: float, shelf: Shelf, single_process: Groups, tmp_path: Path
) -> None:
    run = loop.prepare(short_config(shelf, tmp_path, optimizer={"clip_grad": clip_grad}))
    assert run.optimizer.config.clip_grad == expected
    grad_norm = loop.train_step(run)["grad_norm"]
    assert grad_norm is not None and grad_norm > 0.7


@pytest.mark.parametrize("distributed", [True, False])
def test_gradients_may_be_summed_in_bf16(
    distributed: bool, shelf: Shelf, single_process: Groups, tmp_path: Path
) -> None:
    """Three microbatches a step: their sum is rounded, and the steps go nearly the same way."""
    norms = {}
    for grad_dtype, kept in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        run = loop.prepare(
            short_config(
                shelf,
                tmp_path / grad_dtype,
                case=replace(CASE, dtype="bf16"),
                optimizer={"grad_dtype": grad_dtype, "distributed": distributed},
            )
        )
        rows = [loop.train_step(run) for _ in range(2)]
        parameters = [p for chunk in run.model for p in chunk.parameters() if p.requires_grad]
        assert parameters and all(p.main_grad.dtype == kept for p in parameters)
        norms[grad_dtype] = [row["grad_norm"] for row in rows]
    assert norms["bf16"] == pytest.approx(norms["fp32"], rel=1e-2)
    assert norms["bf16"] != norms["fp32"]
