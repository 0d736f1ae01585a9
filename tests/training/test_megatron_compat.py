"""RMSprop is torch's, under both of Megatron's optimizers; states are made and restored whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from megatron_longpo.config.train import OptimizerConfig as OptimizerSettings
from megatron_longpo.model.spec import transformer_config
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.training import megatron_compat
from megatron_longpo.training.megatron_compat import RMSprop, build_optimizer, initialize_state
from megatron_longpo.training.optimizer import make_scheduler
from tests.model.test_norm import TINY

LR, ALPHA, EPS = 1e-2, 0.9, 1e-6
PLAIN: dict[str, float] = {"lr": LR, "weight_decay": 0.0}


def gradients(step: int, parameters: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) * 10.0 ** (1 - step) for p in parameters]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_are_those_of_torch(weight_decay: float) -> None:
    start = [torch.randn(5, 3), torch.randn(4)]
    ours = [tensor.clone().requires_grad_() for tensor in start]
    theirs = [tensor.clone().requires_grad_() for tensor in start]
    optimizers: list[tuple[Any, list[Tensor]]] = [
        (RMSprop(ours, alpha=ALPHA, eps=EPS, lr=LR, weight_decay=weight_decay), ours),
        (
            torch.optim.RMSprop(theirs, lr=LR, alpha=ALPHA, eps=EPS, weight_decay=weight_decay),
            theirs,
        ),
    ]
    for step in range(6):
        for optimizer, parameters in optimizers:
            for parameter, gradient in zip(parameters, gradients(step, parameters), strict=True):
                parameter.grad = gradient
            optimizer.step()
    for one, other, before in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        assert not torch.equal(one, before)


def test_a_state_in_bf16_is_rounded_once_a_step() -> None:
    """Against the equation in fp32, with the state rounded where it is kept and nowhere else."""
    start = torch.randn(50, 3)
    ours, expected, square = start.clone().requires_grad_(), start.clone(), torch.zeros(50, 3)
    optimizer = RMSprop([ours], alpha=ALPHA, eps=EPS, state_dtype=torch.bfloat16, **PLAIN)
    for step in range(6):
        (gradient,) = gradients(step, [start])
        ours.grad = gradient
        optimizer.step()
        square = ALPHA * square + (1 - ALPHA) * gradient**2
        expected -= LR * gradient / (square.sqrt() + EPS)
        square = square.bfloat16().float()
        assert optimizer.state[ours]["exp_avg_sq"].dtype == torch.bfloat16
    torch.testing.assert_close(ours.detach(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(optimizer.state[ours]["exp_avg_sq"].float(), square)


def test_a_square_average_in_bf16_falls_without_gradients() -> None:
    """At the slowest decay that the settings allow."""
    moved = torch.ones(512, requires_grad=True)
    optimizer = RMSprop([moved], alpha=0.996, eps=EPS, state_dtype=torch.bfloat16, **PLAIN)
    moved.grad = torch.linspace(1, 30, 512)
    optimizer.step()
    first = optimizer.state[moved]["exp_avg_sq"].clone()
    moved.grad = torch.zeros(512)
    for _ in range(200):
        before = optimizer.state[moved]["exp_avg_sq"].clone()
        optimizer.step()
        assert optimizer.state[moved]["exp_avg_sq"].lt(before).all()
    assert optimizer.state[moved]["exp_avg_sq"].lt(first * 0.6).all()


def test_parameters_without_a_gradient_stay() -> None:
    moved, kept = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = RMSprop([moved, kept], alpha=ALPHA, eps=EPS, lr=LR, weight_decay=0.1)
    moved.grad = torch.ones(2)
    optimizer.step()
    assert not moved.eq(1).any() and kept.eq(1).all()


class TwoMatrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(6, 4, generator=generator))
        self.bias = nn.Parameter(torch.randn(4, generator=generator))


def wrapped(*, distributed: bool) -> Any:
    config = transformer_config(TINY, dtype="fp32")
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed
    )
    return DistributedDataParallel(config, settings, TwoMatrices())


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
    settings = OptimizerSettings(
        lr=LR, weight_decay=weight_decay, lr_schedule="constant", warmup_ratio=0.0
    )
    make_scheduler(settings, optimizer, num_steps=100)
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


def test_a_state_without_step_loads_as_it_does_beside_transformer_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(megatron_compat, "_STATE_HOLDS_STEP", False)
    parameter = nn.Parameter(torch.ones(3))
    settings: dict[str, Any] = {"alpha": 0.9, "eps": 1e-8, "lr": 0.1, "weight_decay": 0.0}
    saved = RMSprop([parameter], **settings)
    parameter.grad = torch.tensor([1.0, 2.0, 3.0])
    saved.step()
    assert set(saved.state[parameter]) == {"exp_avg_sq"}
    loaded = RMSprop([parameter], **settings)
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded.state[parameter]["exp_avg_sq"], saved.state[parameter]["exp_avg_sq"])
