"""Attention of new tokens over cached keys and values, for a transformers model."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

ATTENTION = "longpo_cached"
"""The name under which transformers' models find `cached_attention`."""

FEW_QUERIES = 64
"""Up to this many queries a slot, plain products are used if there is a mask."""


def cached_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Implements transformers' attention interface: [1, Hq, n, D] over [S, Hkv, T, D] gives
    [1, n, Hq, D].

    Without a mask S is 1 and the n queries are the last of the T tokens, causally. With one,
    [S, 1, R, T] is added to the scores, n = S * R and each R queries belong to one slot.
    """
    if sliding_window is not None or softcap is not None or s_aux is not None:
        raise NotImplementedError("attention with sliding windows, soft caps or sinks")
    group = query.shape[1] // key.shape[1]
    num_queries = query.shape[2]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if attention_mask is not None and attention_mask.shape[2] <= FEW_QUERIES:
        return _few_queries(query, key, value, attention_mask, scale), None
    if group > 1 and (attention_mask is not None or query.dtype == torch.float32):
        # No fast kernel groups heads with a mask or in fp32.
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    bias: Any = attention_mask
    if bias is None and num_queries > 1:  # one query attends all
        bias = causal_lower_right(num_queries, key.shape[2])
    mixed = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=bias,
        scale=scale,
        enable_gqa=key.shape[1] < query.shape[1],
    )
    return mixed.transpose(1, 2).contiguous(), None


def _few_queries(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Computes attention of few queries over many keys by plain products.

    They spread over the whole GPU, and heads that share their keys read them once.
    """
    (num_slots, _, queries_a_slot, length), head_dim = mask.shape, query.shape[3]
    num_heads = key.shape[1]
    query_HGSRD = query.reshape(num_heads, -1, num_slots, queries_a_slot, head_dim)
    query_SHGRD = query_HGSRD.permute(2, 0, 1, 3, 4)
    scores = torch.matmul(query_SHGRD.reshape(num_slots, num_heads, -1, head_dim), key.mT)
    scores_SHGRT = scores.view(num_slots, num_heads, -1, queries_a_slot, length)
    weights = (scores_SHGRT * scale + mask[:, :, None]).softmax(dim=-1)
    mixed = torch.matmul(weights.view(num_slots, num_heads, -1, length), value)
    mixed_SHGRD = mixed.view(num_slots, num_heads, -1, queries_a_slot, head_dim)
    return mixed_SHGRD.permute(0, 3, 1, 2, 4).reshape(1, num_slots * queries_a_slot, -1, head_dim)
