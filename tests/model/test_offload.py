"""Weights that leave their device: what is where, and when."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_longpo.model.offload import OffloadedWeights


def frozen(device: str = "cpu") -> nn.Module:
    """Two layers that share a weight, and a norm."""
    module = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    module[2].weight = module[0].weight
    return module.to(device).requires_grad_(False)


def test_the_same_numbers_inside_as_before() -> None:
    module = frozen()
    x = torch.randn(3, 8)
    before = module(x)
    weights = OffloadedWeights(module, torch.device("cpu"))
    for _ in range(2):
        with weights.on_device():
            assert torch.equal(module(x), before)
    assert module[2].weight is module[0].weight


def test_weights_that_train_stay() -> None:
    with pytest.raises(AssertionError, match="cannot leave"):
        OffloadedWeights(nn.Linear(2, 2), torch.device("cpu"))


def test_they_leave_after_a_failure_too() -> None:
    module = frozen()
    weights = OffloadedWeights(module, torch.device("cpu"))
    at_home = [parameter.data_ptr() for parameter in module.parameters()]
    with pytest.raises(ZeroDivisionError), weights.on_device():
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
        raise ZeroDivisionError
    assert [parameter.data_ptr() for parameter in module.parameters()] == at_home


@pytest.mark.gpu
def test_on_a_gpu_their_memory_is_free_outside() -> None:
    module = nn.Linear(4096, 4096, bias=False, device="cuda").requires_grad_(False)
    x = torch.randn(2, 4096, device="cuda")
    before = module(x)
    there = torch.cuda.memory_allocated()
    weights = OffloadedWeights(module, torch.device("cuda"))
    assert there - torch.cuda.memory_allocated() == 4 * 4096**2
    assert module.weight.is_pinned()
    with weights.on_device():
        assert torch.equal(module(x), before)
    torch.cuda.synchronize()
    assert there - torch.cuda.memory_allocated() == 4 * 4096**2
