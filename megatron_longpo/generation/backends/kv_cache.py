"""Keys and values of several requests in one row, and the attention over them.

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


class RowCache:
    """What a transformers model writes keys and values to: one buffer a layer, [1, H, capacity, D].

    `length` tokens are there; whoever calls the model advances it.
    """

    is_compileable = False

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes [1, H, n, D] behind `length`; returns all of [1, H, length + n, D]."""
        if layer == len(self._keys):
            self._keys.append(_buffer(keys, self.capacity))
            self._values.append(_buffer(values, self.capacity))
        end = self.length + keys.shape[2]
        self._keys[layer][:, :, self.length : end] = keys
        self._values[layer][:, :, self.length : end] = values
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.length

    def move(self, start: int, length: int, destination: int) -> None:
        """Copies `length` tokens at `start` to `destination`; the two may overlap."""
        for buffer in (*self._keys, *self._values):
            moved = buffer[:, :, start : start + length].clone()
            buffer[:, :, destination : destination + length] = moved

    def resized(self, capacity: int, *, keep: int) -> RowCache:
        """A cache of another capacity that begins with the first `keep` tokens of this one.

        This one gives its buffers up layer by layer, so both are never held whole.
        """
        other = RowCache(capacity)
        other.length = keep
        for mine, its in ((self._keys, other._keys), (self._values, other._values)):
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
    """transformers' attention interface: [1, Hq, n, D] over [1, Hkv, T, D] -> [1, n, Hq, D].

    Without a mask the n queries are the last of the T tokens, causally. With one, [1, 1, G * n, T]
    added to the scores, they are new tokens of n requests; G = Hq / Hkv.
    """
    if sliding_window is not None or softcap is not None or s_aux is not None:
        raise NotImplementedError("attention with sliding windows, soft caps or sinks")
    group = query.shape[1] // key.shape[1]
    if attention_mask is None:
        if query.dtype == torch.float32 and group > 1:  # no fast kernel groups heads in fp32
            key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        length = query.shape[2]
        # One query attends all; else the queries are the last rows of the causal triangle.
        bias = None if length == 1 else causal_lower_right(length, key.shape[2])
        mixed = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bias,
            scale=scaling,
            enable_gqa=key.shape[1] < query.shape[1],
        )
    else:
        # Few queries over many keys: plain products spread over the whole GPU, and heads that
        # share their keys read them once.
        rows = query.reshape(1, key.shape[1], -1, query.shape[3])
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        scores = torch.matmul(rows, key.transpose(2, 3)) * scale + attention_mask
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
        mixed = torch.matmul(weights, value).reshape(query.shape)
    return mixed.transpose(1, 2).contiguous(), None
