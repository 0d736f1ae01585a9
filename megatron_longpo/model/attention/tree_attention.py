"""Core attention over prefix trees, in the place of Megatron's `core_attention`.

Letters: t tokens on this rank, q queries and k keys of the kernels, H heads, G key/value heads,
D head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from megatron_longpo.model.activation_offload import ActivationOffload, Offloaded
from megatron_longpo.model.attention.blocks import Attended, Block, causal_blocks, one_block
from megatron_longpo.model.attention.kernels import AttentionKernel, padded
from megatron_longpo.parallel.attention_plan import AttentionPlan, Span
from megatron_longpo.parallel.context import ContextExchange, QueryKeyValue


class TreeAttention(nn.Module):
    """Attention of each token to its ancestors and, causally, to its own segment.

    Megatron builds and calls it as any core attention, except for `kernel`, `exchange`,
    `keeps_results` and `offload`. The `AttentionPlan` comes as `packed_seq_params`, and masks are
    not read.

    With `keeps_results`, a layer that is recomputed in backward takes its attention's results from
    memory: they are small compared with the cost of computing them again in a long row. If
    `offload` is given, it stores the output until backward.
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
        # By the plan's id, for microbatches whose backward has not run. A plan is kept too, so that
        # no other one gets its id.
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
        """Attends as the plan says: [t,1,H,D], [t,1,G,D], [t,1,G,D] -> [t,1,H*D]."""
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
        return Attended(output, logsumexp)


class _TreeAttentionFunction(torch.autograd.Function):
    """Exchanges, attends and exchanges back; saves no tensor longer than this rank's share."""

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
    ) -> tuple[Tensor, Tensor]:
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
) -> Attended:
    """Runs a plan block by block.

    Args:
        entered: query [q,H,D], key and value [k,G,D], as `plan` counts them.
        plan: what attends what.
        kernel: runs a block.
        scale: of the scores.

    Returns:
        Output [q,H,D] and log-sum-exp [H,q]; 0 for padding, which no piece contains.
    """
    query, key, value = entered
    if not plan.pieces:
        accumulator = torch.promote_types(query.dtype, torch.float32)
        return Attended(
            torch.zeros_like(query), query.new_zeros(query.shape[1::-1], dtype=accumulator)
        )
    num_queries, own = sum(plan.lengths), plan.own_keys
    blocks = causal_blocks(
        _at(query, slice(0, num_queries)),
        _at(key, own),
        _at(value, own),
        plan.lengths,
        scale=scale,
    )
    output, logsumexp = kernel.forward(blocks)
    for piece in plan.pieces:
        if not piece.context:
            continue
        parts = [
            kernel.forward(_rectangle(entered, piece.queries, keys, scale=scale))
            for keys in piece.context
        ]
        rows = slice(piece.queries.start, piece.queries.stop)
        _merge_(output[rows], logsumexp[:, rows], parts)
    padding = len(query) - num_queries
    if padding:
        output, logsumexp = padded(output, len(query)), F.pad(logsumexp, (0, padding))
    return Attended(output, logsumexp)


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
    """Returns the gradients of the query, key and value of `attend`.

    Several blocks may attend one key. Their gradients must not be rounded in between: they are
    summed in fp32 at least, and so are those of a query over its blocks. Where there are two at
    most, one sum in the tensors' own dtype is as exact.
    """
    query, key, value = entered
    if not plan.pieces:
        key_grad, value_grad = (
            torch.zeros_like(tensor, dtype=logsumexp.dtype) for tensor in (key, value)
        )
        return torch.zeros_like(query), key_grad, value_grad
    num_queries, own = sum(plan.lengths), plan.own_keys
    queries = slice(0, num_queries)
    blocks = causal_blocks(
        _at(query, queries), _at(key, own), _at(value, own), plan.lengths, scale=scale
    )
    query_grad, *key_and_value_grads = kernel.backward(
        blocks, Attended(_at(output, queries), logsumexp[:, queries]), _at(output_grad, queries)
    )
    query_grad = padded(query_grad, len(query))
    contexts = [(piece.queries, piece.context) for piece in plan.pieces if piece.context]
    is_exact = plan.adds_once
    if plan.order is not None:
        # Other ranks may have gradients of the same keys, unless all are attended here.
        is_exact = num_queries == len(key) and not contexts
    accumulator = query.dtype if is_exact else logsumexp.dtype
    key_grad, value_grad = (
        _over_all_keys(gradient, own, len(key), dtype=accumulator)
        for gradient in key_and_value_grads
    )
    for span, context in contexts:
        rows = _rows(query_grad, span)
        total = rows.to(accumulator)
        for keys in context:
            gradients = kernel.backward(
                _rectangle(entered, span, keys, scale=scale),
                Attended(output, logsumexp).rows(slice(span.start, span.stop)),
                _rows(output_grad, span),
            )
            total += gradients[0]
            _rows(key_grad, keys).add_(gradients[1])
            _rows(value_grad, keys).add_(gradients[2])
        rows.copy_(total)
    return query_grad, key_grad, value_grad


def _rectangle(entered: QueryKeyValue, queries: Span, keys: Span, *, scale: float) -> Block:
    """Returns the block in which these queries attend all of these keys."""
    query, key, value = entered
    return one_block(
        _rows(query, queries), _rows(key, keys), _rows(value, keys), causal=False, scale=scale
    )


def _rows(tensor: Tensor, span: Span) -> Tensor:
    return tensor[span.start : span.stop]


def _at(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    """Returns `tensor[rows]`; for all rows, the tensor itself without an operator."""
    is_whole = isinstance(rows, slice) and rows.stop - rows.start == len(tensor)
    return tensor if is_whole else tensor[rows]


def _over_all_keys(
    gradient: Tensor, own: slice | Tensor, num_keys: int, *, dtype: torch.dtype
) -> Tensor:
    """[n,G,D] -> [k,G,D]: the gradient of the keys `own`, and 0 for all others."""
    if len(gradient) == num_keys and isinstance(own, slice):
        return gradient.to(dtype)
    whole = gradient.new_zeros(num_keys, *gradient.shape[1:], dtype=dtype)
    whole[own] = gradient.to(dtype)
    return whole


def _merge_(output: Tensor, logsumexp: Tensor, parts: list[Attended]) -> None:
    """Merges `parts`, which are over other keys, into an output [q,H,D] and log-sum-exp [H,q].

    Each is weighted by its share of the softmax denominator, which is a sigmoid for two. Outputs
    are rounded once, after all are merged.
    """
    exact = output
    for part, part_logsumexp in parts:
        share = torch.sigmoid(part_logsumexp - logsumexp).T.unsqueeze(-1)
        exact = torch.addcmul(exact * (1 - share), part, share)
        torch.logaddexp(logsumexp, part_logsumexp, out=logsumexp)
    output.copy_(exact)
