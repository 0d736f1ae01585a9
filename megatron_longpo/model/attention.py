"""Core attention over prefix trees, in the place of Megatron's `core_attention`.

Letters: t tokens on this rank, H heads, G key/value heads, D head size; all of this rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from megatron_longpo.model.kernels import AttentionKernel
from megatron_longpo.parallel.layout import AttentionPlan, Span


class TreeAttention(nn.Module):
    """Each token attends its ancestors and, causally, its own segment (design.md section 2).

    Built and called as Megatron builds and calls any core attention; the `AttentionPlan` comes as
    `packed_seq_params`, and no mask is read.
    """

    def __init__(
        self,
        *,
        kernel: AttentionKernel,
        config: Any,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: AttentionPlan | None = None,
    ) -> Tensor:
        """[t,1,H,D], [t,1,G,D], [t,1,G,D] -> [t,1,H*D]."""
        assert packed_seq_params is not None, "tree attention needs an AttentionPlan"
        output = _TreeAttentionFunction.apply(
            query.squeeze(1),
            key.squeeze(1),
            value.squeeze(1),
            packed_seq_params,
            self.kernel,
            self.scale,
        )
        return output.flatten(1).unsqueeze(1)


class _TreeAttentionFunction(torch.autograd.Function):
    """Runs a plan block by block; saves what it was given, its output and its log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: AttentionPlan,
        kernel: AttentionKernel,
        scale: float,
    ) -> Tensor:
        # Padding tokens are in no piece: their output is 0 and stays finite.
        output = torch.zeros_like(query, memory_format=torch.contiguous_format)
        accumulator = torch.promote_types(query.dtype, torch.float32)
        logsumexp = torch.zeros(
            query.shape[1], query.shape[0], dtype=accumulator, device=query.device
        )
        for piece in plan.pieces:
            queries = piece.queries
            parts = [
                kernel.forward(
                    _rows(query, queries),
                    _rows(key, keys),
                    _rows(value, keys),
                    causal=causal,
                    scale=scale,
                )
                for keys, causal in _blocks(piece.context, piece.own_keys)
            ]
            merged_output, merged_logsumexp = _merge(parts)
            output[queries.start : queries.stop] = merged_output
            logsumexp[:, queries.start : queries.stop] = merged_logsumexp
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.plan, ctx.kernel, ctx.scale = plan, kernel, scale
        return output

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        (output_grad,) = output_grads
        query, key, value, output, logsumexp = ctx.saved_tensors
        # A key is attended from several blocks, whose gradients must not be rounded in between.
        accumulator = torch.promote_types(query.dtype, torch.float32)
        query_grad = torch.zeros_like(query, dtype=accumulator)
        key_grad = torch.zeros_like(key, dtype=accumulator)
        value_grad = torch.zeros_like(value, dtype=accumulator)
        for piece in ctx.plan.pieces:
            queries = piece.queries
            for keys, causal in _blocks(piece.context, piece.own_keys):
                block_grads = ctx.kernel.backward(
                    _rows(output_grad, queries),
                    _rows(query, queries),
                    _rows(key, keys),
                    _rows(value, keys),
                    _rows(output, queries),
                    logsumexp[:, queries.start : queries.stop],
                    causal=causal,
                    scale=ctx.scale,
                )
                query_grad[queries.start : queries.stop] += block_grads[0]
                key_grad[keys.start : keys.stop] += block_grads[1]
                value_grad[keys.start : keys.stop] += block_grads[2]
        return (
            query_grad.to(query.dtype),
            key_grad.to(key.dtype),
            value_grad.to(value.dtype),
            None,
            None,
            None,
        )


def _blocks(context: tuple[Span, ...], own_keys: Span) -> list[tuple[Span, bool]]:
    """The key spans a piece attends, each with whether it does so causally."""
    return [*((span, False) for span in context), (own_keys, True)]


def _rows(tensor: Tensor, span: Span) -> Tensor:
    return tensor[span.start : span.stop]


def _merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Joins outputs over disjoint keys: each weighted by its share of the softmax denominator.

    Takes and returns output [q,H,D] and log-sum-exp [H,q].
    """
    if len(parts) == 1:
        return parts[0]
    logsumexps = torch.stack([logsumexp for _, logsumexp in parts])
    total = torch.logsumexp(logsumexps, dim=0)
    weights = (logsumexps - total).exp()
    output = sum(
        part.to(total.dtype) * weight.T.unsqueeze(-1)
        for (part, _), weight in zip(parts, weights, strict=True)
    )
    assert isinstance(output, Tensor)
    return output, total
