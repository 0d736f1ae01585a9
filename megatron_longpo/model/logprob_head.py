"""Log-probabilities of edges from hidden states, without ever building all logits.

The output layer runs over chunks of edges; a chunk's logits live only while its log-sum-exp is
taken, and are computed again in backward. The vocabulary may be sharded over tensor-parallel
ranks, as in `tensor_parallel.vocab_parallel_cross_entropy`.

Letters: t tokens, h hidden size, v this rank's share of the padded vocabulary, e edges, c edges of
a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

CHUNK_BYTES = 256 * 2**20
"""Room for one chunk's logits in fp32; backward needs about twice that at its peak."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabularyShard:
    """Which token ids the rows of this rank's output weight stand for."""

    start: int
    """Token id of the first row."""
    num_valid: int
    """Rows that stand for a token; those after it are padding and have probability 0."""
    group: ProcessGroup

    @staticmethod
    def of_rank(*, rows: int, vocab_size: int, group: ProcessGroup) -> VocabularyShard:
        """The shard of this rank where each rank of `group` holds `rows` rows."""
        start = rows * group.rank()
        return VocabularyShard(
            start=start, num_valid=min(max(vocab_size - start, 0), rows), group=group
        )


def edge_logps(
    hidden: Tensor,
    weight: Tensor,
    sources: Tensor,
    targets: Tensor,
    shard: VocabularyShard,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Log-probability, in nats, that each edge's source token gives to its target.

    Under tensor parallelism `hidden` is whole on every rank, and its gradient is this rank's part
    of a sum over ranks: the caller's gather or copy from the tensor-parallel region adds them up.

    Args:
        hidden: [t,h] final hidden states.
        weight: [v,h] this rank's rows of the output weight.
        sources: [e] int64, indices into `hidden`; may repeat.
        targets: [e] int64 token ids.
        shard: what the rows of `weight` are.
        chunk_bytes: bytes of one chunk's logits in fp32.

    Returns:
        [e] in fp32 (fp64 for fp64 inputs), the same on every tensor-parallel rank.
    """
    chunk_edges = max(1, chunk_bytes // (4 * weight.shape[0]))
    return _EdgeLogps.apply(hidden, weight, sources, targets, shard, chunk_edges)


class _EdgeLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        sources: Tensor,
        targets: Tensor,
        shard: VocabularyShard,
        chunk_edges: int,
    ) -> Tensor:
        accumulator = torch.promote_types(hidden.dtype, torch.float32)
        logps = torch.empty(len(sources), dtype=accumulator, device=hidden.device)
        normalizers = torch.empty_like(logps)
        for begin in range(0, len(sources), chunk_edges):
            chunk = slice(begin, begin + chunk_edges)
            logits = _logits(hidden[sources[chunk]], weight, shard, accumulator)
            normalizer = log_sum_exp(logits, shard.group)
            normalizers[chunk] = normalizer
            logps[chunk] = _target_logits(logits, targets[chunk], shard) - normalizer
        ctx.save_for_backward(hidden, weight, sources, targets, normalizers)
        ctx.shard, ctx.chunk_edges = shard, chunk_edges
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (logps_grad,) = grads
        hidden, weight, sources, targets, normalizers = ctx.saved_tensors
        shard: VocabularyShard = ctx.shard
        hidden_grad = torch.zeros_like(hidden, dtype=normalizers.dtype)
        weight_grad = torch.zeros_like(weight, dtype=normalizers.dtype)
        for begin in range(0, len(sources), ctx.chunk_edges):
            chunk = slice(begin, begin + ctx.chunk_edges)
            states = hidden[sources[chunk]]
            logits = _logits(states, weight, shard, normalizers.dtype)
            # d logp / d logits = onehot(target) - softmax
            logits_grad = logits.sub_(normalizers[chunk, None]).exp_().neg_()
            rows, is_local = _local_rows(targets[chunk], shard)
            logits_grad.scatter_add_(1, rows[:, None], is_local.to(logits_grad.dtype)[:, None])
            logits_grad = logits_grad.mul_(logps_grad[chunk, None]).to(weight.dtype)
            # The last token of a shared prefix is the source of several edges.
            hidden_grad.index_add_(0, sources[chunk], (logits_grad @ weight).to(hidden_grad.dtype))
            weight_grad += logits_grad.T @ states
        return hidden_grad.to(hidden.dtype), weight_grad.to(weight.dtype), None, None, None, None


def _logits(states: Tensor, weight: Tensor, shard: VocabularyShard, dtype: torch.dtype) -> Tensor:
    """[c,h] -> [c,v]; rows of the vocabulary's padding get no probability."""
    logits = (states @ weight.T).to(dtype)
    logits[:, shard.num_valid :] = float("-inf")
    return logits


def log_sum_exp(logits: Tensor, group: ProcessGroup) -> Tensor:
    """[c,v] -> [c], over the whole vocabulary."""
    local = torch.logsumexp(logits, dim=-1)
    if group.size() == 1:
        return local
    highest = local.clone()
    dist.all_reduce(highest, op=ReduceOp.MAX, group=group)
    total = (local - highest).exp()
    dist.all_reduce(total, group=group)
    return highest + total.log()


def _target_logits(logits: Tensor, targets: Tensor, shard: VocabularyShard) -> Tensor:
    """[c,v], [c] -> [c]: the logit of each target, from the rank that holds it."""
    rows, is_local = _local_rows(targets, shard)
    picked = logits.gather(1, rows[:, None]).squeeze(1).masked_fill(~is_local, 0)
    if shard.group.size() > 1:
        dist.all_reduce(picked, group=shard.group)
    return picked


def _local_rows(targets: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Row of each target in this rank's weight (0 where it has none), and whether it has one."""
    rows = targets - shard.start
    is_local = (rows >= 0) & (rows < shard.num_valid)
    return torch.where(is_local, rows, 0), is_local
