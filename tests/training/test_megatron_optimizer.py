"""Megatron's optimizers step as torch's; states are made and restored whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import megatron.core.optimizer as megatron_core_optimizer
import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import nn

from megatron_longpo.config.train import OptimizerConfig as TrainOptimizerConfig
from megatron_longpo.model.spec import transformer_config
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.training.megatron_optimizer import build_optimizer, initialize_state
from megatron_longpo.training.optimizer import make_scheduler
from tests.model.test_norm import TINY
from tests.training.optimizer_steps import ALPHA, EPS, LR, gradients


class TwoMatrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(6, 4, generator=generator))
        self.bias = nn.Parameter(torch.randn(4, generator=generator))


def wrapped(*, distributed: bool) -> Any:
    config = transformer_config(TINY, dtype="fp32")
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed
    )
    return DistributedDataParallel(config, ddp_config, TwoMatrices())


def make(
    model: Any, *, distributed: bool, rmsprop: bool, weight_decay: float = 0.0
) -> MegatronOptimizer:
    config = OptimizerConfig(
        optimizer="adam",
        lr=LR,
        weight_decay=weight_decay,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_eps=EPS,
        use_distributed_optimizer=distributed,
        clip_grad=1e9,
    )
    optimizer = build_optimizer(config, [model], rmsprop_alpha=ALPHA if rmsprop else None)
    # It is Megatron's schedule that takes the decay off biases and norms.
    schedule = TrainOptimizerConfig(
        lr=LR, weight_decay=weight_decay, lr_schedule="constant", warmup_ratio=0.0
    )
    make_scheduler(schedule, optimizer, num_steps=100)
    return optimizer


def train(model: Any, optimizer: MegatronOptimizer, steps: range) -> None:
    for step in steps:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        parameters = list(model.parameters())
        for parameter, gradient in zip(parameters, gradients(step, parameters), strict=True):
            parameter.main_grad.copy_(gradient)
        success, grad_norm, _ = optimizer.step()
        assert success and grad_norm > 0


def torch_rmsprop(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(groups, lr=LR, alpha=ALPHA, eps=EPS)


def torch_adam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=LR, betas=(0.8, 0.95), eps=EPS)


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize(("rmsprop", "plain"), [(True, torch_rmsprop), (False, torch_adam)])
def test_megatrons_optimizer_is_torchs(
    rmsprop: bool,
    plain: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    distributed: bool,
    single_process: Groups,
) -> None:
    """Weight decay spares the bias in both."""
    model, expected = wrapped(distributed=distributed), TwoMatrices()
    train(
        model,
        make(model, distributed=distributed, rmsprop=rmsprop, weight_decay=0.1),
        range(5),
    )
    optimizer = plain(
        [
            {"params": [expected.first], "weight_decay": 0.1},
            {"params": [expected.bias], "weight_decay": 0.0},
        ]
    )
    for step in range(5):
        parameters = list(expected.parameters())
        for parameter, gradient in zip(parameters, gradients(step, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rmsprop", [True, False])
@pytest.mark.parametrize("distributed", [True, False])
def test_state_is_one_of_its_own_for_each_parameter(
    rmsprop: bool, distributed: bool, single_process: Groups
) -> None:
    model = wrapped(distributed=distributed)
    optimizer = make(model, distributed=distributed, rmsprop=rmsprop)
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    assert all(isinstance(part, DistributedOptimizer) is distributed for part in parts)
    initialize_state(optimizer)
    states = [state for part in parts for state in part.optimizer.state.values()]
    assert len(states) == 2
    expected = {"step", "exp_avg_sq"} if rmsprop else {"step", "exp_avg", "exp_avg_sq"}
    for state in states:
        assert set(state) == expected, "rmsprop has no first moment, in memory neither"
        assert all(tensor.eq(0).all() for tensor in state.values())
    assert states[0]["step"] is not states[1]["step"]
    train(model, optimizer, range(3))
    assert [state["step"].item() for state in states] == [3.0, 3.0]
    initialize_state(optimizer)
    assert [state["step"].item() for state in states] == [3.0, 3.0], "what is there stays"


def test_megatron_s_module_is_left_as_it_was(single_process: Groups) -> None:
    names = ("Adam", "USING_PYTORCH_OPTIMIZER")
    before = [getattr(megatron_core_optimizer, name) for name in names]
    make(wrapped(distributed=False), distributed=False, rmsprop=True)
    assert [getattr(megatron_core_optimizer, name) for name in names] == before
    with pytest.raises(AttributeError):
        # Fails inside, after the names were replaced.
        build_optimizer(OptimizerConfig(optimizer="adam", lr=LR), [None], rmsprop_alpha=ALPHA)
    assert [getattr(megatron_core_optimizer, name) for name in names] == before
