"""Attention with the whole score matrix and a mask: what kernels and trees must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dense_attention(inputs: Sequence[Tensor], mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Query [q,H,D], key and value [k,G,D], [q,k] bool (True = attended) -> [q,H,D], [H,q].

    The second is the log-sum-exp of the scores. A query that attends nothing gives 0.
    """
    query, key, value = inputs
    groups = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.where(mask, scores.softmax(-1), 0.0).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, values), scores.logsumexp(-1)


def dense_gradients(
    inputs: Sequence[Tensor], mask: Tensor, scale: float, output_grad: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value by autograd."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output, _ = dense_attention(leaves, mask, scale)
    return torch.autograd.grad(output, leaves, output_grad)


def block_mask(queries: int, keys: int, *, causal: bool) -> Tensor:
    whole = torch.ones(queries, keys, dtype=torch.bool)
    return whole.tril() if causal else whole
