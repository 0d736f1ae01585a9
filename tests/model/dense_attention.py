"""Attention with the whole score matrix and a mask, in fp64: what kernels and trees must equal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """[q,H,D], [k,G,D], [k,G,D], [q,k] bool (True = attended) -> [q,H,D] and log-sum-exp [H,q].

    A query that attends nothing gives 0.
    """
    groups = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.where(mask, scores.softmax(-1), 0.0).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, values), scores.logsumexp(-1)


def dense_gradients(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], output_grad: Tensor
) -> list[Tensor]:
    """Gradients of query, key and value of any attention function."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return list(torch.autograd.grad(attend(*leaves), leaves, output_grad))


def causal_mask(queries: int, keys: int, *, causal: bool) -> Tensor:
    whole = torch.ones(queries, keys, dtype=torch.bool)
    return whole.tril() if causal else whole
