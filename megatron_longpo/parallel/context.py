"""How context-parallel ranks exchange queries, keys and values around the attention kernels.

Each rank holds t tokens of a forest, dealt by `TokenLayout`. There are three ways:

- `GatherKeys`: keys and values are gathered and queries stay, for any number of heads.
- `ScatterHeads`: heads are scattered, and every rank sees all tokens of its heads (Ulysses, arXiv
  2309.14509).
- `ScatterAndGather`: heads are scattered among neighbours, as many as the heads or a machine allow,
  and keys are gathered across such groups.

Letters: c ranks of the group, n of them that scatter heads among themselves, t tokens on a rank,
T tokens of the forest, q those of the n ranks, H heads, G key/value heads, D head size.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_longpo.parallel.attention_plan import TokenOrder
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.parallel.head_shares import kv_repeats

QueryKeyValue = tuple[Tensor, Tensor, Tensor]


class ContextExchange(Protocol):
    """Communication before and after the attention kernels; `order` is `AttentionPlan.order`."""

    keeps_local: bool
    """Whether backward starts from this rank's tensors, rather than those that the kernels saw."""

    def enter(self, local: QueryKeyValue, order: TokenOrder | None) -> QueryKeyValue:
        """Returns what the kernels take, from this rank's query [t,H,D], key and value [t,G,D]."""
        ...

    def enter_like_query(self, local: Tensor, order: TokenOrder | None) -> Tensor:
        """Returns [t,H,D] as `enter` does queries: for the output and its gradient in backward."""
        ...

    def leave(self, output: Tensor, order: TokenOrder | None, *, num_local: int) -> Tensor:
        """Returns this rank's [t,H,D], from the kernels' output."""
        ...

    def leave_gradients(
        self, gradients: QueryKeyValue, order: TokenOrder | None, *, num_local: int
    ) -> QueryKeyValue:
        """Returns gradients of what `enter` was given, from those of what it returned."""
        ...


class NoExchange:
    """The exchange of one rank: nothing."""

    keeps_local = True

    def enter(self, local: QueryKeyValue, order: TokenOrder | None) -> QueryKeyValue:
        return local

    def enter_like_query(self, local: Tensor, order: TokenOrder | None) -> Tensor:
        return local

    def leave(self, output: Tensor, order: TokenOrder | None, *, num_local: int) -> Tensor:
        return output

    def leave_gradients(
        self, gradients: QueryKeyValue, order: TokenOrder | None, *, num_local: int
    ) -> QueryKeyValue:
        return gradients


class GatherKeys:
    """`all_gather`: keys and values of all ranks, queries of this one.

    Only this rank's tensors are kept from forward to backward, which gathers again. Key and value
    gradients are summed in fp32 before they are scattered.
    """

    keeps_local = True

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def enter(self, local: QueryKeyValue, order: TokenOrder | None) -> QueryKeyValue:
        """Exchanges query, key and value: [t,H,D], 2 x [t,G,D] -> [t,H,D], 2 x [T,G,D]."""
        assert order is not None
        query, key, value = local
        key, value = gathered_tokens(key, value, self.group)
        return query, key[order.all], value[order.all]

    def enter_like_query(self, local: Tensor, order: TokenOrder | None) -> Tensor:
        return local

    def leave(self, output: Tensor, order: TokenOrder | None, *, num_local: int) -> Tensor:
        return output

    def leave_gradients(
        self, gradients: QueryKeyValue, order: TokenOrder | None, *, num_local: int
    ) -> QueryKeyValue:
        """Returns gradients to their tokens: [t,H,D], 2 x [T,G,D] -> [t,H,D], 2 x [t,G,D]."""
        assert order is not None
        query_grad, key_grad, value_grad = gradients
        num_tokens = self.group.size() * num_local
        key_grad, value_grad = (
            _to_ranks_order(gradient, order.all, num_tokens) for gradient in (key_grad, value_grad)
        )
        return query_grad, *summed_back(key_grad, value_grad, self.group)


class ScatterHeads:
    """`a2a`: all tokens of a share of the heads on each rank.

    Key/value heads are repeated first if there are fewer than ranks, or if they do not divide.
    """

    keeps_local = False

    def __init__(self, group: ProcessGroup, *, num_heads: int, num_kv_heads: int) -> None:
        self.group = group
        self.repeats = kv_repeats(num_heads, num_kv_heads, group.size())

    def enter(self, local: QueryKeyValue, order: TokenOrder | None) -> QueryKeyValue:
        """Exchanges them: [t,H,D], 2 x [t,G,D] -> [T,H/c,D], 2 x [T,G*repeats/c,D]."""
        assert order is not None
        query, key, value = local
        return (
            scattered_heads(query, self.group)[order.all],
            scattered_heads(_repeated(key, self.repeats), self.group)[order.all],
            scattered_heads(_repeated(value, self.repeats), self.group)[order.all],
        )

    def enter_like_query(self, local: Tensor, order: TokenOrder | None) -> Tensor:
        assert order is not None
        return scattered_heads(local, self.group)[order.all]

    def leave(self, output: Tensor, order: TokenOrder | None, *, num_local: int) -> Tensor:
        """Returns the output to its tokens: [T,H/c,D] -> [t,H,D]."""
        assert order is not None
        num_tokens = self.group.size() * num_local
        return gathered_heads(_to_ranks_order(output, order.all, num_tokens), self.group)

    def leave_gradients(
        self, gradients: QueryKeyValue, order: TokenOrder | None, *, num_local: int
    ) -> QueryKeyValue:
        """Returns gradients: [T,H/c,D], 2 x [T,G*repeats/c,D] -> [t,H,D], 2 x [t,G,D]."""
        query_grad, key_grad, value_grad = (
            self.leave(gradient, order, num_local=num_local) for gradient in gradients
        )
        return (
            query_grad,
            _unrepeated(key_grad, self.repeats),
            _unrepeated(value_grad, self.repeats),
        )


class ScatterAndGather:
    """`a2a+all_gather`: heads scattered among the n ranks of `inner`, keys gathered over `outer`.

    Queries of all tokens of the n ranks, for some heads, attend all keys of these heads. Fast links
    between neighbours carry the heads, slower ones only the keys. As in `GatherKeys`, backward
    starts from this rank's tensors.
    """

    keeps_local = True

    def __init__(
        self, inner: ProcessGroup, outer: ProcessGroup, *, num_heads: int, num_kv_heads: int
    ) -> None:
        self.inner, self.outer = inner, outer
        self.repeats = kv_repeats(num_heads, num_kv_heads, inner.size())

    def enter(self, local: QueryKeyValue, order: TokenOrder | None) -> QueryKeyValue:
        """Exchanges them: [t,H,D], 2 x [t,G,D] -> [q,H/n,D], 2 x [T,G*repeats/n,D]."""
        assert order is not None
        query, key, value = local
        key, value = (
            scattered_heads(_repeated(tensor, self.repeats), self.inner) for tensor in (key, value)
        )
        key, value = gathered_tokens(key, value, self.outer)
        return self.enter_like_query(query, order), key[order.all], value[order.all]

    def enter_like_query(self, local: Tensor, order: TokenOrder | None) -> Tensor:
        """Exchanges a tensor of the query's shape: [t,H,D] -> [q,H/n,D]."""
        assert order is not None
        return scattered_heads(local, self.inner)[order.inner]

    def leave(self, output: Tensor, order: TokenOrder | None, *, num_local: int) -> Tensor:
        """Returns the output to its tokens: [q,H/n,D] -> [t,H,D]."""
        assert order is not None
        num_tokens = self.inner.size() * num_local
        return gathered_heads(_to_ranks_order(output, order.inner, num_tokens), self.inner)

    def leave_gradients(
        self, gradients: QueryKeyValue, order: TokenOrder | None, *, num_local: int
    ) -> QueryKeyValue:
        """Returns gradients: [q,H/n,D], 2 x [T,G*repeats/n,D] -> [t,H,D], 2 x [t,G,D]."""
        assert order is not None
        query_grad, key_grad, value_grad = gradients
        num_tokens = self.outer.size() * self.inner.size() * num_local
        key_grad, value_grad = (
            _to_ranks_order(gradient, order.all, num_tokens) for gradient in (key_grad, value_grad)
        )
        key_grad, value_grad = (
            _unrepeated(gathered_heads(gradient, self.inner), self.repeats)
            for gradient in summed_back(key_grad, value_grad, self.outer)
        )
        return self.leave(query_grad, order, num_local=num_local), key_grad, value_grad


def gathered_tokens(key: Tensor, value: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Gathers two tensors in one call: [t,X,D] -> [ranks*t,X,D], one rank behind the other."""
    mine = torch.stack((key, value))
    gathered = mine.new_empty(2 * group.size(), *mine.shape[1:])
    dist.all_gather_into_tensor(gathered, mine, group=group)
    key, value = gathered.unflatten(0, (-1, 2)).transpose(0, 1).flatten(1, 2)
    return key, value


def summed_back(key: Tensor, value: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Sums over ranks, as `gathered_tokens` transposed: 2 x [ranks*t,X,D] -> 2 x [t,X,D]."""
    by_rank = torch.stack((key, value)).unflatten(1, (group.size(), -1))
    by_rank = by_rank.transpose(0, 1).flatten(0, 1)
    mine = torch.empty_like(by_rank[:2])
    dist.reduce_scatter_tensor(mine, by_rank, group=group)
    return mine[0], mine[1]


def scattered_heads(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Scatters heads and gathers tokens of all ranks: [t,X,D] -> [ranks*t,X/ranks,D]."""
    sent = tensor.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.flatten(0, 1)


def gathered_heads(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Inverts `scattered_heads`, and is its transpose: [ranks*t,X/ranks,D] -> [t,X,D]."""
    sent = tensor.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.unflatten(0, (group.size(), -1)).transpose(0, 1).flatten(1, 2)


def _to_ranks_order(tensor: Tensor, order: Tensor, num_tokens: int) -> Tensor:
    """Returns tokens at their places `order` among `num_tokens`; 0 for padding, which has none."""
    placed = tensor.new_zeros(num_tokens, *tensor.shape[1:])
    placed[order] = tensor
    return placed


def _repeated(tensor: Tensor, repeats: int) -> Tensor:
    return tensor.repeat_interleave(repeats, dim=1) if repeats > 1 else tensor


def _unrepeated(gradient: Tensor, repeats: int) -> Tensor:
    """The transpose of `_repeated`."""
    return gradient.unflatten(1, (-1, repeats)).sum(2) if repeats > 1 else gradient


def make_exchange(groups: Groups, *, num_heads: int, num_kv_heads: int) -> ContextExchange:
    """Returns the exchange for the context-parallel sizes and a tensor-parallel rank's heads."""
    size, inner = groups.context.size(), groups.sizes.context_inner
    if size == 1:
        return NoExchange()
    if inner == 1:
        return GatherKeys(groups.context)
    if inner == size:
        return ScatterHeads(groups.context, num_heads=num_heads, num_kv_heads=num_kv_heads)
    return ScatterAndGather(
        groups.context_inner,
        groups.context_outer,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
    )
