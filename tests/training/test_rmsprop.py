"""RMSprop's updates are torch's, with a state in fp32 or bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_longpo.training import rmsprop
from megatron_longpo.training.rmsprop import RMSprop
from tests.training.optimizer_steps import ALPHA, EPS, LR, gradients

PLAIN: dict[str, float] = {"lr": LR, "weight_decay": 0.0}


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


def test_a_state_without_step_loads_as_it_does_beside_transformer_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rmsprop, "STATE_HOLDS_STEP", False)
    parameter = nn.Parameter(torch.ones(3))
    settings: dict[str, Any] = {"alpha": 0.9, "eps": 1e-8, "lr": 0.1, "weight_decay": 0.0}
    saved = RMSprop([parameter], **settings)
    parameter.grad = torch.tensor([1.0, 2.0, 3.0])
    saved.step()
    assert set(saved.state[parameter]) == {"exp_avg_sq"}
    loaded = RMSprop([parameter], **settings)
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded.state[parameter]["exp_avg_sq"], saved.state[parameter]["exp_avg_sq"])
