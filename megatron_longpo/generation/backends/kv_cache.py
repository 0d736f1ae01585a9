"""Keys and values of one document's requests in one row, and the attention over them.

The row holds what the requests' prompts begin with once, then each request's own tokens; a mask
says which of them a new token attends. So nothing is padded, and no prefix is copied:

    shared prefix | rest of prompt 0 | rest of prompt 1 | ... | first new tokens | second ...
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

ATTENTION = "longpo_row"
"""The name under which transformers' models find `row_attention`."""

FEW_QUERIES = 64
"""Up to so many a row, plain products are used where there is a mask."""


class RowCache:
    """What a transformers model writes keys and values to: one buffer a layer, [1, H, capacity, D].

    `length` tokens are there; whoever calls the model advances it.
    """

    is_compileable = False

    def __init__(
        self,
        capacity: int,
        *,
        keys: list[torch.Tensor] | None = None,
        values: list[torch.Tensor] | None = None,
    ) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys: list[torch.Tensor] = keys or []
        self.values: list[torch.Tensor] = values or []
        self.places: torch.Tensor | None = None
        """Where the next tokens are written, [n], in place of behind `length`."""

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes [1, H, n, D] behind `length`; returns all of [1, H, length + n, D].

        With `places`, writes there and returns [1, H, length, D].
        """
        if layer == len(self.keys):
            self.keys.append(_buffer(keys, self.capacity))
            self.values.append(_buffer(values, self.capacity))
        if self.places is not None:
            self.keys[layer].index_copy_(2, self.places, keys)
            self.values[layer].index_copy_(2, self.places, values)
            return self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]
        end = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.length

    def move(self, start: int, length: int, destination: int) -> None:
        """Copies `length` tokens at `start` to `destination`; the two may overlap."""
        for buffer in (*self.keys, *self.values):
            moved = buffer[:, :, start : start + length].clone()
            buffer[:, :, destination : destination + length] = moved

    def resized(self, capacity: int, *, keep: int) -> RowCache:
        """A cache of another capacity that begins with the first `keep` tokens of this one.

        This one gives its buffers up layer by layer, so both are never held whole.
        """
        other = RowCache(capacity)
        other.length = keep
        for mine, its in ((self.keys, other.keys), (self.values, other.values)):
            for index, buffer in enumerate(mine):
                its.append(_buffer(buffer, capacity))
                its[index][:, :, :keep] = buffer[:, :, :keep]
                mine[index] = buffer[:, :, :0]
        return other


def _buffer(like: torch.Tensor, capacity: int) -> torch.Tensor:
    shape = (1, like.shape[1], capacity, like.shape[3])
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def row_attention(
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
    """transformers' attention interface: [1, Hq, n, D] over [S, Hkv, T, D] -> [1, n, Hq, D].

    Without a mask S is 1 and the n queries are the last of the T tokens, causally. With one,
    [S, 1, R, T] added to the scores, n = S * R and each R queries belong to one row of keys.
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
    """Few queries over many keys: plain products spread over the whole GPU, and heads that share
    their keys read them once."""
    (num_rows, _, queries_a_row, length), head_dim = mask.shape, query.shape[3]
    num_heads = key.shape[1]
    query_HGSRD = query.reshape(num_heads, -1, num_rows, queries_a_row, head_dim)
    query_SHGRD = query_HGSRD.permute(2, 0, 1, 3, 4)
    scores = torch.matmul(query_SHGRD.reshape(num_rows, num_heads, -1, head_dim), key.mT)
    scores_SHGRT = scores.view(num_rows, num_heads, -1, queries_a_row, length)
    weights = (scores_SHGRT * scale + mask[:, :, None]).softmax(dim=-1)
    mixed = torch.matmul(weights.view(num_rows, num_heads, -1, length), value)
    mixed_SHGRD = mixed.view(num_rows, num_heads, -1, queries_a_row, head_dim)
    return mixed_SHGRD.permute(0, 3, 1, 2, 4).reshape(1, num_rows * queries_a_row, -1, head_dim)


@torch.inference_mode()
def forward(
    model: Any,
    cache: Any,
    ids_n: torch.Tensor,
    positions_n: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    logits: int | torch.Tensor,
) -> torch.Tensor:
    """Logits [N, V] of the last N tokens, or of those at the places `logits` [N]."""
    output = model(
        input_ids=ids_n[None],
        position_ids=positions_n[None],
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=logits,
    )
    logits_NV: torch.Tensor = output.logits[0]
    return logits_NV
