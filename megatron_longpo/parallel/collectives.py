"""A sum over ranks with the right gradient, and decisions that all ranks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_longpo.errors import UserError

T = TypeVar("T")


def sum_over(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Sums a tensor over ranks, which then all compute the same loss from it.

    Backward is the identity: each rank has the gradient of the one loss with respect to its own
    part. (Another all-reduce in backward would count the loss once for every rank.)
    """
    return tensor if group.size() == 1 else _SumOver.apply(tensor, group)


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Returns whether `flag` holds on any rank of the world."""
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


def from_main_rank(compute: Callable[[], T]) -> T:
    """Calls `compute` on rank 0 alone, and returns its result on every rank.

    Use it for what reads files, so that all ranks see the same ones.

    Raises:
        UserError: on every rank, if rank 0 raised it.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = compute()
        except UserError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]
