"""Log-probabilities of edges from hidden states, without ever building all logits.

The output layer runs over chunks of edges. A chunk's logits are in memory only while its
log-sum-exp is computed, and are computed again in backward. The vocabulary may be sharded over
tensor-parallel ranks, as in `tensor_parallel.vocab_parallel_cross_entropy`.

Letters: t tokens, h hidden size, v this rank's share of the padded vocabulary, e edges, c edges of
a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp
from torch.profiler import record_function

from megatron_longpo.model.head.logit_rows import logits_gradient_, row_statistics
from megatron_longpo.parallel.transfer import to_device

CHUNK_BYTES = 1280 * 2**20
"""Bytes of one chunk's logits, of which there is one copy: gradients overwrite them. Fewer, larger
chunks add less often to the weight's gradient, which takes up to 2 GiB in fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabularyShard:
    """The token ids that the rows of this rank's output weight stand for."""

    start: int
    """Token id of the first row."""
    num_valid: int
    """Rows that stand for a token; those after it are padding and have probability 0."""
    group: ProcessGroup

    @staticmethod
    def of_rank(*, rows: int, vocab_size: int, group: ProcessGroup) -> VocabularyShard:
        """Returns the shard of this rank where each rank of `group` holds `rows` rows."""
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
    sources_on_host: np.ndarray | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Returns the log-probability, in nats, that each edge's source token gives to its target.

    Under tensor parallelism `hidden` is whole on every rank, and its gradient is this rank's part
    of a sum over ranks: the caller's gather or copy from the tensor-parallel region sums them.

    Args:
        hidden: [t,h] final hidden states.
        weight: [v,h] this rank's rows of the output weight.
        sources: [e] int64, indices into `hidden`; may repeat.
        targets: [e] int64 token ids.
        shard: what the rows of `weight` are.
        sources_on_host: the same as `sources`; None = they are read back, and the CPU waits for the
            GPU.
        chunk_bytes: bytes of one chunk's logits.

    Returns:
        [e] in fp32 (fp64 for fp64 inputs), the same on every tensor-parallel rank.
    """
    chunk_edges = max(1, chunk_bytes // (weight.element_size() * weight.shape[0]))
    edges = _Edges.of(
        sources,
        sources.cpu().numpy() if sources_on_host is None else sources_on_host,
        chunk_edges=chunk_edges,
        num_tokens=len(hidden),
    )
    return _EdgeLogps.apply(hidden, weight, edges, targets, shard)


class _EdgeLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        edges: _Edges,
        targets: Tensor,
        shard: VocabularyShard,
    ) -> Tensor:
        accumulator = torch.promote_types(hidden.dtype, torch.float32)
        columns = local_columns(targets, shard)
        normalizers = torch.empty(len(targets), dtype=accumulator, device=hidden.device)
        logps = torch.empty_like(normalizers)
        with record_function("head"):
            for chunk in edges.chunks():
                logits = edges.states(hidden, chunk) @ weight.T
                normalizers[chunk], logps[chunk] = row_statistics(
                    logits, columns[chunk], num_valid=shard.num_valid
                )
                del logits  # before the next chunk's are there
        normalizers = log_sum_over(normalizers, shard.group)
        if shard.group.size() > 1:
            dist.all_reduce(logps, group=shard.group)
        logps -= normalizers
        ctx.save_for_backward(hidden, weight, columns, normalizers)
        ctx.edges, ctx.num_valid = edges, shard.num_valid
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (logps_grad,) = grads
        with record_function("head"):
            return *_EdgeLogps._gradients(ctx, logps_grad), None, None, None

    @staticmethod
    def _gradients(ctx: Any, logps_grad: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden, weight, columns, normalizers = ctx.saved_tensors
        edges: _Edges = ctx.edges
        hidden_grad = _HiddenGradient(edges, hidden, accumulator=normalizers.dtype)
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = torch.zeros_like(weight, dtype=normalizers.dtype)
        for chunk in edges.chunks():
            states = edges.states(hidden, chunk)
            logits_grad = logits_gradient_(
                states @ weight.T,
                columns[chunk],
                normalizers[chunk],
                logps_grad[chunk],
                num_valid=ctx.num_valid,
            )
            hidden_grad.add(chunk, logits_grad, weight)
            if weight_grad is not None:
                _add_product(weight_grad, logits_grad.T, states)
            del logits_grad  # before the next chunk's are there
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight.dtype)
        return hidden_grad.total(), weight_grad


@dataclass(frozen=True, kw_only=True, slots=True)
class _Edges:
    """Sources of all edges, and what the CPU finds out about them: which are adjacent or repeat."""

    sources: Tensor
    """[e] int64 on the device."""
    on_host: np.ndarray
    """[e] int64, the same on the host."""
    repeated: np.ndarray
    """[r] sources of several edges, such as the last token of a shared prefix; ascending."""
    is_covered: bool
    """Whether every token is a source."""
    chunk_edges: int

    @staticmethod
    def of(sources: Tensor, on_host: np.ndarray, *, chunk_edges: int, num_tokens: int) -> _Edges:
        counts = np.bincount(on_host, minlength=num_tokens)
        return _Edges(
            sources=sources,
            on_host=on_host,
            repeated=np.flatnonzero(counts > 1),
            is_covered=bool((counts > 0).all()),
            chunk_edges=chunk_edges,
        )

    def chunks(self) -> Iterator[slice]:
        """Yields chunks of the edges, none of them empty."""
        num_edges = len(self.on_host)
        for begin in range(0, num_edges, self.chunk_edges):
            yield slice(begin, min(begin + self.chunk_edges, num_edges))

    def run(self, chunk: slice) -> slice | None:
        """Returns the tokens of a chunk's sources if they are adjacent and ascending, else None."""
        sources = self.on_host[chunk]
        is_run = (np.diff(sources) == 1).all()
        return slice(int(sources[0]), int(sources[-1]) + 1) if is_run else None

    def states(self, hidden: Tensor, chunk: slice) -> Tensor:
        """Takes the states of a chunk's sources, [t,h] -> [c,h]; a view if they are adjacent."""
        run = self.run(chunk)
        return hidden[self.sources[chunk]] if run is None else hidden[run]


class _HiddenGradient:
    """The gradient of hidden states in their own dtype, summed in fp32 where sources repeat.

    In fp32 for all tokens it would be the head's largest tensor, while only a few tokens have more
    than one edge.
    """

    def __init__(self, edges: _Edges, hidden: Tensor, *, accumulator: torch.dtype) -> None:
        self.edges = edges
        make = torch.empty_like if edges.is_covered else torch.zeros_like
        self.gradient = make(hidden, memory_format=torch.contiguous_format)
        self.repeated = to_device(edges.repeated, hidden.device)
        self.sums = hidden.new_zeros(len(edges.repeated), hidden.shape[1], dtype=accumulator)

    def add(self, chunk: slice, logits_grad: Tensor, weight: Tensor) -> None:
        """Adds a chunk's gradient [c,v]. `total` corrects the rows of repeated sources."""
        run = self.edges.run(chunk)
        if run is None:
            rows = logits_grad @ weight
            self.gradient[self.edges.sources[chunk]] = rows
        else:
            rows = torch.mm(logits_grad, weight, out=self.gradient[run])
        if len(self.repeated):
            sources = self.edges.on_host[chunk]
            here = np.flatnonzero(np.isin(sources, self.edges.repeated))
            slots = np.searchsorted(self.edges.repeated, sources[here])
            device = rows.device
            self.sums.index_add_(
                0, to_device(slots, device), rows[to_device(here, device)].to(self.sums.dtype)
            )

    def total(self) -> Tensor:
        """Returns the gradient of all tokens, [t,h]."""
        self.gradient[self.repeated] = self.sums.to(self.gradient.dtype)
        return self.gradient


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to `total` in its dtype, which may be more precise than the factors'."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.is_cuda and _has_mixed_addmm():
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


@functools.cache
def _has_mixed_addmm() -> bool:
    """Whether torch (from 2.8) can add the product of bf16 matrices to an fp32 one."""
    return "dtype_out" in torch.ops.aten.addmm.overloads()


def log_sum_exp(logits: Tensor, group: ProcessGroup) -> Tensor:
    """Takes log-sum-exps, [c,v] -> [c], over the whole vocabulary."""
    return log_sum_over(torch.logsumexp(logits, dim=-1), group)


def log_sum_over(local: Tensor, group: ProcessGroup) -> Tensor:
    """Joins log-sum-exps over each rank's share to those over the whole vocabulary, [e] -> [e]."""
    if group.size() == 1:
        return local
    highest = local.clone()
    dist.all_reduce(highest, op=ReduceOp.MAX, group=group)
    total = (local - highest).exp()
    dist.all_reduce(total, group=group)
    return highest + total.log()


def local_columns(targets: Tensor, shard: VocabularyShard) -> Tensor:
    """Returns [e], the column of each target in this rank's logits, -1 where it has none."""
    columns = targets - shard.start
    return torch.where((columns >= 0) & (columns < shard.num_valid), columns, -1)
