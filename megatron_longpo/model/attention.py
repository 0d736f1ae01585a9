"""Core attention over prefix trees, in the place of Megatron's `core_attention`.

Letters: t tokens on this rank, q queries and k keys of the kernels, H heads, G key/value heads,
D head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from megatron_longpo.model.activation_offload import ActivationOffload, Offloaded
from megatron_longpo.model.kernels import AttentionKernel
from megatron_longpo.parallel.context import ContextExchange, QueryKeyValue
from megatron_longpo.parallel.layout import AttentionPlan, QueryPiece, Span

Attended = tuple[Tensor, Tensor]
"""This rank's output [t,H,D], and the log-sum-exp of its kernels' scores."""


class TreeAttention(nn.Module):
    """Each token attends its ancestors and, causally, its own segment (design.md section 2).

    Built and called as Megatron builds and calls any core attention, but for `kernel`, `exchange`,
    `keeps_results` and `offload`; the `AttentionPlan` comes as `packed_seq_params`, and no mask is
    read.

    With `keeps_results`, a layer that is recomputed in backward gets its attention's results from
    memory: they are small beside what computing them again would cost in a long row. `offload`
    has the output until then, where there is one.
    """

    def __init__(
        self,
        *,
        kernel: AttentionKernel,
        exchange: ContextExchange,
        keeps_results: bool = False,
        offload: ActivationOffload | None = None,
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
        self.exchange = exchange
        self.keeps_results = keeps_results
        # By the plan's id: of the microbatches whose backward is still to come. A plan is kept
        # too, lest another one get its id.
        self._kept: dict[int, tuple[AttentionPlan, Tensor | Offloaded, Tensor]] = {}
        self.offload = offload
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
        plan = packed_seq_params
        kept = self._take(plan) if torch.is_grad_enabled() else None
        output, logsumexp = _TreeAttentionFunction.apply(
            query.squeeze(1),
            key.squeeze(1),
            value.squeeze(1),
            plan,
            self.kernel,
            self.exchange,
            self.scale,
            kept,
        )
        if self.keeps_results and self.training and not torch.is_grad_enabled():
            # The first pass of a layer that will run once more, with gradients.
            kept_output = output if self.offload is None else self.offload.put(output)
            self._kept[id(plan)] = plan, kept_output, logsumexp
        return output.flatten(1).unsqueeze(1)

    def _take(self, plan: AttentionPlan) -> Attended | None:
        if id(plan) not in self._kept:
            return None
        _, output, logsumexp = self._kept.pop(id(plan))
        if self.offload is not None:
            output = self.offload.fetch(output)
        assert isinstance(output, Tensor)
        return output, logsumexp


class _TreeAttentionFunction(torch.autograd.Function):
    """Exchange, attend, exchange back; saves no tensor that is longer than this rank's share."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: AttentionPlan,
        kernel: AttentionKernel,
        exchange: ContextExchange,
        scale: float,
        kept: Attended | None,
    ) -> Attended:
        # Values come as a view of the projection that queries and keys were copied from: kept as
        # they are, they would keep all of it.
        local = (query.contiguous(), key.contiguous(), value.contiguous())
        entered = local
        if kept is None or not exchange.keeps_local:
            entered = exchange.enter(local, plan.order)
        if kept is None:
            with record_function("attention"):
                attended, logsumexp = attend(entered, plan, kernel, scale=scale)
            output = exchange.leave(attended, plan.order, num_local=len(query))
        else:
            output, logsumexp = kept
        ctx.save_for_backward(*(local if exchange.keeps_local else entered), output, logsumexp)
        ctx.plan, ctx.kernel, ctx.exchange, ctx.scale = plan, kernel, exchange, scale
        ctx.mark_non_differentiable(logsumexp)
        return output, logsumexp

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        *kept, output, logsumexp = ctx.saved_tensors
        plan, exchange = ctx.plan, ctx.exchange
        query, key, value = kept
        entered = (query, key, value)
        if exchange.keeps_local:
            entered = exchange.enter(entered, plan.order)
        output_grad = exchange.enter_like_query(output_grads[0], plan.order)
        entered_output = exchange.enter_like_query(output, plan.order)
        with record_function("attention"):
            gradients = attend_backward(
                output_grad, entered, entered_output, logsumexp, plan, ctx.kernel, scale=ctx.scale
            )
        gradients = exchange.leave_gradients(gradients, plan.order, num_local=len(output))
        return (*(gradient.to(query.dtype) for gradient in gradients), *[None] * 5)


def attend(
    entered: QueryKeyValue, plan: AttentionPlan, kernel: AttentionKernel, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Runs a plan block by block.

    Args:
        entered: query [q,H,D], key and value [k,G,D], as `plan` counts them.
        plan: what attends what.
        kernel: runs a block.
        scale: of the scores.

    Returns:
        Output [q,H,D] and log-sum-exp [H,q]; 0 for padding, which is in no piece.
    """
    query, key, value = entered
    accumulator = torch.promote_types(query.dtype, torch.float32)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    logsumexp = torch.empty(query.shape[1], query.shape[0], dtype=accumulator, device=query.device)
    for gap in _gaps([piece.queries for piece in plan.pieces], len(query)):
        output[gap.start : gap.stop] = 0
        logsumexp[:, gap.start : gap.stop] = 0
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
            for keys, causal in _blocks(piece)
        ]
        merged_output, merged_logsumexp = _merge(parts)
        if len(queries) == len(query):
            return merged_output, merged_logsumexp
        output[queries.start : queries.stop] = merged_output
        logsumexp[:, queries.start : queries.stop] = merged_logsumexp
    return output, logsumexp


def attend_backward(
    output_grad: Tensor,
    entered: QueryKeyValue,
    output: Tensor,
    logsumexp: Tensor,
    plan: AttentionPlan,
    kernel: AttentionKernel,
    *,
    scale: float,
) -> QueryKeyValue:
    """Gradients of `attend`'s query, key and value.

    A key is attended from several blocks, whose gradients must not be rounded in between: those of
    key and value are summed in fp32 at least, and so is a query's over its blocks. Where the plan
    is one block they are what the kernel returns.
    """
    query, key, value = entered
    if len(plan.pieces) == 1 and len(plan.pieces[0].queries) == len(query) == len(key):
        assert not plan.pieces[0].context, "all keys are the piece's own"
        return kernel.backward(
            output_grad, query, key, value, output, logsumexp, causal=True, scale=scale
        )
    query_grad = torch.empty_like(query, memory_format=torch.contiguous_format)
    key_grad, value_grad = (
        torch.empty(tensor.shape, dtype=logsumexp.dtype, device=tensor.device)
        for tensor in (key, value)
    )
    for gap in _gaps([piece.queries for piece in plan.pieces], len(query)):
        query_grad[gap.start : gap.stop] = 0
    # No two pieces have keys of their own in common: those are written, all others are added.
    for gap in _gaps([piece.own_keys for piece in plan.pieces], len(key)):
        key_grad[gap.start : gap.stop] = 0
        value_grad[gap.start : gap.stop] = 0

    def block_gradients(queries: Span, keys: Span, *, causal: bool) -> QueryKeyValue:
        return kernel.backward(
            _rows(output_grad, queries),
            _rows(query, queries),
            _rows(key, keys),
            _rows(value, keys),
            _rows(output, queries),
            logsumexp[:, queries.start : queries.stop],
            causal=causal,
            scale=scale,
        )

    for piece in plan.pieces:
        queries, keys = piece.queries, piece.own_keys
        gradients = block_gradients(queries, keys, causal=True)
        query_grad[queries.start : queries.stop] = gradients[0]
        key_grad[keys.start : keys.stop] = gradients[1]
        value_grad[keys.start : keys.stop] = gradients[2]
    for piece in plan.pieces:
        if not piece.context:
            continue
        queries = piece.queries
        query_sum = _rows(query_grad, queries).to(logsumexp.dtype)
        for keys in piece.context:
            gradients = block_gradients(queries, keys, causal=False)
            query_sum += gradients[0]
            key_grad[keys.start : keys.stop] += gradients[1]
            value_grad[keys.start : keys.stop] += gradients[2]
        query_grad[queries.start : queries.stop] = query_sum
    return query_grad, key_grad, value_grad


def _gaps(spans: list[Span], length: int) -> list[Span]:
    """What disjoint spans leave of [0, length)."""
    gaps, begin = [], 0
    for span in sorted(spans, key=lambda span: span.start):
        if span.start > begin:
            gaps.append(Span(begin, span.start))
        begin = span.stop
    if begin < length:
        gaps.append(Span(begin, length))
    return gaps


def _blocks(piece: QueryPiece) -> list[tuple[Span, bool]]:
    """The key spans a piece attends, each with whether it does so causally."""
    return [*((span, False) for span in piece.context), (piece.own_keys, True)]


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
    output: Tensor | None = None
    for (part, _), weight in zip(parts, weights, strict=True):
        share = part * weight.T.unsqueeze(-1)
        output = share if output is None else output.add_(share)
    assert output is not None
    return output.to(parts[0][0].dtype), total
