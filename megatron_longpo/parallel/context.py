"""How context-parallel ranks exchange queries, keys and values around the attention kernels.

Each rank holds t tokens of a forest, dealt by `TokenLayout`. Either keys and values are gathered
and queries stay (`GatherKeys`, any number of heads), or heads are scattered and every rank sees
all tokens of its heads (`ScatterHeads`, Ulysses, arXiv 2309.14509).

Letters: c ranks of the group, t tokens on a rank, T tokens of the forest, H heads, G key/value
heads, D head size.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_longpo.errors import UserError

QueryKeyValue = tuple[Tensor, Tensor, Tensor]


class ContextExchange(Protocol):
    """What attention does before and after its kernels; `order` is `AttentionPlan.order`."""

    keeps_local: bool
    """Whether backward starts from this rank's tensors, or from those that the kernels saw."""

    def enter(self, local: QueryKeyValue, order: Tensor | None) -> QueryKeyValue:
        """This rank's query [t,H,D], key and value [t,G,D] -> what the kernels take."""
        ...

    def enter_like_query(self, local: Tensor, order: Tensor | None) -> Tensor:
        """[t,H,D] -> as the kernels' queries: for the output and its gradient in backward."""
        ...

    def leave(self, output: Tensor, order: Tensor | None, *, num_local: int) -> Tensor:
        """The kernels' output -> this rank's [t,H,D]."""
        ...

    def leave_gradients(
        self, gradients: QueryKeyValue, order: Tensor | None, *, num_local: int
    ) -> QueryKeyValue:
        """Gradients of what `enter` returned -> of what it was given."""
        ...


class NoExchange:
    """One rank: nothing to exchange."""

    keeps_local = True

    def enter(self, local: QueryKeyValue, order: Tensor | None) -> QueryKeyValue:
        return local

    def enter_like_query(self, local: Tensor, order: Tensor | None) -> Tensor:
        return local

    def leave(self, output: Tensor, order: Tensor | None, *, num_local: int) -> Tensor:
        return output

    def leave_gradients(
        self, gradients: QueryKeyValue, order: Tensor | None, *, num_local: int
    ) -> QueryKeyValue:
        return gradients


class GatherKeys:
    """`all_gather`: keys and values of all ranks, queries of this one.

    Only this rank's tensors live from forward to backward, which gathers again; key and value
    gradients are summed in fp32 before they are scattered.
    """

    keeps_local = True

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def enter(self, local: QueryKeyValue, order: Tensor | None) -> QueryKeyValue:
        """[t,H,D], 2 x [t,G,D] -> [t,H,D], 2 x [T,G,D]."""
        assert order is not None
        query, key, value = local
        mine = torch.stack((key, value))
        gathered = mine.new_empty(2 * self.group.size(), *mine.shape[1:])
        dist.all_gather_into_tensor(gathered, mine, group=self.group)
        key, value = gathered.unflatten(0, (-1, 2)).transpose(0, 1).flatten(1, 2)[:, order]
        return query, key, value

    def enter_like_query(self, local: Tensor, order: Tensor | None) -> Tensor:
        return local

    def leave(self, output: Tensor, order: Tensor | None, *, num_local: int) -> Tensor:
        return output

    def leave_gradients(
        self, gradients: QueryKeyValue, order: Tensor | None, *, num_local: int
    ) -> QueryKeyValue:
        """[t,H,D], 2 x [T,G,D] -> [t,H,D], 2 x [t,G,D]."""
        assert order is not None
        query_grad, key_grad, value_grad = gradients
        size = self.group.size()
        by_rank = key_grad.new_zeros(2, size * num_local, *key_grad.shape[1:])
        by_rank[:, order] = torch.stack((key_grad, value_grad))
        by_rank = by_rank.unflatten(1, (size, num_local)).transpose(0, 1).flatten(0, 1)
        mine = torch.empty_like(by_rank[:2])
        dist.reduce_scatter_tensor(mine, by_rank, group=self.group)
        return query_grad, mine[0], mine[1]


class ScatterHeads:
    """`a2a`: all tokens of a share of the heads on each rank.

    Key/value heads that are fewer than the ranks, or do not divide, are repeated first.
    """

    keeps_local = False

    def __init__(self, group: ProcessGroup, *, num_heads: int, num_kv_heads: int) -> None:
        self.group = group
        self.repeats = kv_repeats(num_heads, num_kv_heads, group.size())

    def enter(self, local: QueryKeyValue, order: Tensor | None) -> QueryKeyValue:
        """[t,H,D], 2 x [t,G,D] -> [T,H/c,D], 2 x [T,G*repeats/c,D]."""
        query, key, value = local
        return (
            self._to_heads(query, order),
            self._to_heads(key.repeat_interleave(self.repeats, dim=1), order),
            self._to_heads(value.repeat_interleave(self.repeats, dim=1), order),
        )

    def enter_like_query(self, local: Tensor, order: Tensor | None) -> Tensor:
        return self._to_heads(local, order)

    def leave(self, output: Tensor, order: Tensor | None, *, num_local: int) -> Tensor:
        """[T,H/c,D] -> [t,H,D]."""
        return self._to_tokens(output, order, num_local=num_local)

    def leave_gradients(
        self, gradients: QueryKeyValue, order: Tensor | None, *, num_local: int
    ) -> QueryKeyValue:
        """[T,H/c,D], 2 x [T,G*repeats/c,D] -> [t,H,D], 2 x [t,G,D]."""
        query_grad, key_grad, value_grad = (
            self._to_tokens(gradient, order, num_local=num_local) for gradient in gradients
        )
        return query_grad, self._unrepeat(key_grad), self._unrepeat(value_grad)

    def _to_heads(self, tensor: Tensor, order: Tensor | None) -> Tensor:
        """[t,X,D] -> [T,X/c,D]."""
        assert order is not None
        sent = tensor.unflatten(1, (self.group.size(), -1)).transpose(0, 1).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return received.flatten(0, 1)[order]

    def _to_tokens(self, tensor: Tensor, order: Tensor | None, *, num_local: int) -> Tensor:
        """[T,X/c,D] -> [t,X,D]; padding tokens get 0."""
        assert order is not None
        sent = tensor.new_zeros(self.group.size() * num_local, *tensor.shape[1:])
        sent[order] = tensor
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return received.unflatten(0, (self.group.size(), num_local)).transpose(0, 1).flatten(1, 2)

    def _unrepeat(self, gradient: Tensor) -> Tensor:
        return gradient.unflatten(1, (-1, self.repeats)).sum(2)


def kv_repeats(num_heads: int, num_kv_heads: int, size: int) -> int:
    """How often `a2a` repeats each key/value head so that `size` ranks get equal shares.

    Raises:
        UserError: if the heads cannot be shared out, with sizes that would do.
    """
    repeats = math.lcm(num_kv_heads, size) // num_kv_heads
    if num_heads % (num_kv_heads * repeats):
        fitting = [
            str(other)
            for other in range(1, num_heads + 1)
            if num_heads % math.lcm(num_kv_heads, other) == 0
        ]
        raise UserError(
            f"parallel.context ({size}): a2a cannot share {num_heads} heads and {num_kv_heads} "
            f"key/value heads (of a tensor-parallel rank) out over that many ranks; use "
            f"{', '.join(fitting)}, or parallel.context_comm all_gather, which takes any size"
        )
    return repeats


def make_exchange(
    comm: str, group: ProcessGroup, *, num_heads: int, num_kv_heads: int
) -> ContextExchange:
    """The exchange that `parallel.context_comm` names, for a tensor-parallel rank's heads."""
    if group.size() == 1:
        return NoExchange()
    if comm == "a2a":
        return ScatterHeads(group, num_heads=num_heads, num_kv_heads=num_kv_heads)
    assert comm == "all_gather", comm
    return GatherKeys(group)
