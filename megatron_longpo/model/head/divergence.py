"""Reverse KL divergence between next-token distributions, without ever building all logits.

As in logprobs.py, it runs over chunks of places whose logits are in memory only while they are
needed, and are computed again in backward. The vocabulary may be sharded over tensor-parallel
ranks.

Letters: t student tokens, h and g hidden sizes of student and teacher, v this rank's share of the
padded vocabulary, d places, c places of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_longpo.model.head.logprobs import VocabularyShard, log_sum_exp

CHUNK_BYTES = 256 * 2**20
"""Bytes of one model's logits of a chunk in fp32; backward needs several times that."""


def reverse_kl(
    hidden: Tensor,
    weight: Tensor,
    sources: Tensor,
    teacher_states: Tensor,
    teacher_weight: Tensor,
    shard: VocabularyShard,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Returns KL(student || teacher) = sum_v p_v (log p_v - log q_v) of each place, in nats.

    The teacher gets no gradient. That of `hidden` is this rank's part of a sum over tensor-parallel
    ranks, as in `logprobs.edge_logps`.

    Args:
        hidden: [t,h] the student's final hidden states.
        weight: [v,h] this rank's rows of the student's output weight.
        sources: [d] int64, indices into `hidden`.
        teacher_states: [d,g] the teacher's final hidden state of each place.
        teacher_weight: [v,g] this rank's rows of the teacher's output weight.
        shard: what the rows of both weights are: the vocabularies must be the same.
        chunk_bytes: bytes of one chunk's logits in fp32.

    Returns:
        [d] in fp32 (fp64 for fp64 inputs), the same on every tensor-parallel rank.
    """
    return _ReverseKL.apply(
        hidden, weight, sources, teacher_states, teacher_weight, shard, chunk_bytes
    )


def place_chunks(num_places: int, weight: Tensor, chunk_bytes: int) -> Iterator[slice]:
    """Yields chunks of places; one model's logits of one take at most `chunk_bytes` in fp32.

    A chunk has one place at least.
    """
    size = max(1, chunk_bytes // (4 * weight.shape[0]))
    for begin in range(0, num_places, size):
        yield slice(begin, begin + size)


class _ReverseKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        sources: Tensor,
        teacher_states: Tensor,
        teacher_weight: Tensor,
        shard: VocabularyShard,
        chunk_bytes: int,
    ) -> Tensor:
        accumulator = torch.promote_types(hidden.dtype, torch.float32)
        divergences = torch.empty(len(sources), dtype=accumulator, device=hidden.device)
        normalizers = torch.empty_like(divergences)
        teacher_normalizers = torch.empty_like(divergences)
        for chunk in place_chunks(len(sources), weight, chunk_bytes):
            logits = _logits(hidden[sources[chunk]], weight, shard, accumulator)
            teacher_logits = _logits(teacher_states[chunk], teacher_weight, shard, accumulator)
            normalizers[chunk] = log_sum_exp(logits, shard.group)
            teacher_normalizers[chunk] = log_sum_exp(teacher_logits, shard.group)
            logps = logits.sub_(normalizers[chunk, None])
            ratios = logps - teacher_logits.sub_(teacher_normalizers[chunk, None])
            divergences[chunk] = _summed(logps.exp_().mul_(ratios).sum(-1), shard.group)
        ctx.save_for_backward(
            hidden,
            weight,
            sources,
            teacher_states,
            teacher_weight,
            normalizers,
            teacher_normalizers,
            divergences,
        )
        ctx.shard, ctx.chunk_bytes = shard, chunk_bytes
        return divergences

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (divergence_grad,) = grads
        hidden, weight, sources, teacher_states, teacher_weight, *kept = ctx.saved_tensors
        normalizers, teacher_normalizers, divergences = kept
        shard: VocabularyShard = ctx.shard
        hidden_grad = torch.zeros_like(hidden, dtype=normalizers.dtype)
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = torch.zeros_like(weight, dtype=normalizers.dtype)
        for chunk in place_chunks(len(sources), weight, ctx.chunk_bytes):
            states = hidden[sources[chunk]]
            logps = _logits(states, weight, shard, normalizers.dtype)
            logps.sub_(normalizers[chunk, None])
            teacher_logps = _logits(
                teacher_states[chunk], teacher_weight, shard, normalizers.dtype
            ).sub_(teacher_normalizers[chunk, None])
            # d KL / d logit_v = p_v * (log p_v - log q_v - KL)
            excess = (logps - teacher_logps).sub_(divergences[chunk, None])
            logits_grad = logps.exp_().mul_(excess).mul_(divergence_grad[chunk, None])
            logits_grad = logits_grad.to(weight.dtype)
            valid = weight[: shard.num_valid]
            hidden_grad.index_add_(0, sources[chunk], (logits_grad @ valid).to(hidden_grad.dtype))
            if weight_grad is not None:
                weight_grad[: shard.num_valid] += logits_grad.T @ states
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight.dtype)
        return hidden_grad.to(hidden.dtype), weight_grad, *[None] * 5


def _logits(states: Tensor, weight: Tensor, shard: VocabularyShard, dtype: torch.dtype) -> Tensor:
    """[c,h] -> [c, rows that stand for a token]: with padding, 0 log 0 would be NaN."""
    return (states @ weight[: shard.num_valid].T).to(dtype)


def _summed(partial: Tensor, group: ProcessGroup) -> Tensor:
    if group.size() > 1:
        dist.all_reduce(partial, group=group)
    return partial
