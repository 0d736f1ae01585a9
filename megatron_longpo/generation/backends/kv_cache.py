"""Keys and values of one document's prompts, and the call of a model that reads into them."""

from __future__ import annotations

from typing import Any

import torch


class PromptCache:
    """What a transformers model writes keys and values to: one buffer a layer, [1, H, capacity, D].

    The first `length` tokens are filled; the caller of the model advances it.
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
        """Where the next tokens are written, [n], instead of behind `length`."""

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes [1, H, n, D] behind `length` and returns all of [1, H, length + n, D].

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

    @torch.inference_mode()
    def move(self, start: int, length: int, destination: int) -> None:
        """Copies `length` tokens at `start` to `destination`; the two may overlap."""
        for buffer in (*self.keys, *self.values):
            moved = buffer[:, :, start : start + length].clone()
            buffer[:, :, destination : destination + length] = moved


def _buffer(like: torch.Tensor, capacity: int) -> torch.Tensor:
    shape = (1, like.shape[1], capacity, like.shape[3])
    return torch.empty(shape, dtype=like.dtype, device=like.device)


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
    """Runs the model; returns logits [N, V] of the last N tokens, or of those at the places
    `logits` [N]."""
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
