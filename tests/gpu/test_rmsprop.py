"""RMSprop's fused update on a GPU is torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_longpo.megatron_compat import RMSprop

pytestmark = pytest.mark.gpu


def test_a_state_in_bf16_gives_the_cpus_update() -> None:
    shapes = [(3,), (1000, 17)]
    start = [torch.randn(shape) for shape in shapes]
    there = [torch.nn.Parameter(tensor.cuda()) for tensor in start]
    here = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    settings: Any = {"alpha": 0.9, "eps": 1e-8, "lr": 0.01, "weight_decay": 0.1}
    optimizers = [RMSprop(p, state_dtype=torch.bfloat16, **settings) for p in (there, here)]
    for _ in range(3):
        for a, b in zip(there, here, strict=True):
            b.grad = torch.randn(b.shape)
            a.grad = b.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(there, here, strict=True):
        # A square on the edge between two bf16 numbers may be rounded to either.
        torch.testing.assert_close(a.cpu(), b, rtol=1e-2, atol=1e-4)
        assert optimizers[0].state[a]["exp_avg_sq"].dtype == torch.bfloat16


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_are_torchs(weight_decay: float) -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    shapes = [(3,), (1000, 17), (2048, 512)]
    start = [torch.randn(shape, generator=generator, device="cuda") for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    mine = RMSprop(ours, alpha=0.9, eps=1e-8, lr=0.01, weight_decay=weight_decay)
    torchs = torch.optim.RMSprop(theirs, lr=0.01, alpha=0.9, eps=1e-8, weight_decay=weight_decay)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator, device="cuda")
            b.grad = a.grad.clone()
        mine.step()
        torchs.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
