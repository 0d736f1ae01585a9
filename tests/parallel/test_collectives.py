from __future__ import annotations

import torch

from megatron_longpo.parallel.collectives import _SumOver, sum_over
from megatron_longpo.parallel.groups import Groups


def test_one_rank_sums_nothing(single_process: Groups) -> None:
    tensor = torch.ones(3)
    assert sum_over(tensor, single_process.context) is tensor


def test_the_gradient_of_the_sum_is_passed_through(single_process: Groups) -> None:
    tensor = torch.tensor([1.0, 2.0], requires_grad=True)
    total = _SumOver.apply(tensor, single_process.context)
    assert torch.equal(total, tensor) and total is not tensor
    (gradient,) = torch.autograd.grad(total, tensor, torch.tensor([3.0, 5.0]))
    assert gradient.tolist() == [3.0, 5.0]
