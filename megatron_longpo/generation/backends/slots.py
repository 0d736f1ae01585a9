"""Keys and values of several documents under way, each in a slot.

S slots of C tokens, for R requests at most. A slot holds what its document's prompts begin with
once, then the rest of each prompt, then the new tokens of all its requests as they are written:

    shared prefix | rest of prompt 0 | rest of prompt 1 | ... | first new tokens | ... | spare

Every token of a slot has an owner, which says who attends it: one request, or all of the slot's.
So documents come and go, nothing is padded, and no prefix is copied. Requests that write nothing
put their keys at the spare token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_longpo.generation.backends.kv_cache import PromptCache, forward
from megatron_longpo.generation.backends.running import BLOCK, RunningRequest, common_length

LENGTH_STEP = 256
"""Prompts that are read together attend over a multiple of this many tokens."""

ALL, NOBODY, IDLE = -1, -2, -3
"""Owners of tokens besides the number of one request; IDLE: of requests that write nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotShape:
    """How the room for keys and values is divided."""

    num_slots: int
    num_requests: int
    """Of a slot."""
    capacity: int
    """Tokens of a slot, the spare one too."""


class SlotCache:
    """What a transformers model writes keys and values to while it writes one token a request.

    Two buffers a layer, [S, H, C, D]; the numbers of each request are on the device, so that
    nothing is waited for between two tokens.
    """

    is_compileable = False

    def __init__(
        self, shape: SlotShape, *, keys: list[torch.Tensor], values: list[torch.Tensor]
    ) -> None:
        self.shape = shape
        self._keys, self._values = keys, values
        self._device, self._dtype = keys[0].device, keys[0].dtype
        self._kept: list[list[int]] = [[] for _ in range(shape.num_slots)]
        """Ids whose keys and values begin each slot: whole blocks."""
        self._lengths = [0] * shape.num_slots
        """How many tokens of each slot are filled."""
        self._owners_SC = torch.full(
            (shape.num_slots, shape.capacity), NOBODY, dtype=torch.long, device=self._device
        )
        self._columns_C = torch.arange(shape.capacity, device=self._device)
        most = shape.num_slots * shape.num_requests
        self._state = torch.zeros((6, most), dtype=torch.long, device=self._device)
        """Of each request: token id, position, owner, slot, place in the slot, and how far the
        place moves with each token."""
        self._placed = self._state
        self._length = shape.capacity

    # ------------------------------------------------------------ one token a request

    @torch.inference_mode()
    def place(self, active: Sequence[dict[int, RunningRequest]], *, width: int, steps: int) -> int:
        """Makes room for `steps` tokens of each active request; returns the fullest slot's length.

        `active` has those of each slot by their numbers, at most `width`. Logits will come slot by
        slot, `width` of each.
        """
        spare = self.shape.capacity - 1
        columns: list[list[int]] = []
        for slot, requests in enumerate(active):
            for place, (number, request) in enumerate(requests.items(), self._lengths[slot]):
                position = len(request.prompt) + len(request.written) - 1
                columns.append([request.written[-1], position, number, slot, place, len(requests)])
            columns += [[0, 0, IDLE, slot, spare, 0]] * (width - len(requests))
            self._lengths[slot] += steps * len(requests)
        # In place, so that a CUDA graph finds them.
        self._placed = self._state[:, : len(columns)]
        self._placed.copy_(torch.tensor(columns).T)
        return max(
            length for length, requests in zip(self._lengths, active, strict=True) if requests
        )

    @torch.inference_mode()
    def advance(self, tokens_N: torch.Tensor) -> None:
        """Takes the token that was chosen for each request."""
        ids_N, positions_N, _, _, places_N, strides_N = self._placed
        ids_N.copy_(tokens_N)
        positions_N += strides_N.sign()
        places_N += strides_N

    @torch.inference_mode()
    def step(self, model: Any, length: int, *, masked: bool = True) -> torch.Tensor:
        """Returns logits [N, V] behind each request's last token; attends the first `length`.

        Without a mask, the one request that was placed attends all of them.
        """
        self._length = length
        ids_N, positions_N, owners_N, slots_N, places_N, _ = self._placed
        self._owners_SC[slots_N, places_N] = owners_N
        mask = None
        if masked:
            shape = (self.shape.num_slots, -1)
            mask = self._mask(self._owners_SC, owners_N.view(shape), places_N.view(shape))
        return forward(model, self, ids_N, positions_N, mask, logits=len(ids_N))

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes [1, H, N, D], a token a request; returns all of [S, H, T, D]."""
        _, _, _, slots_N, places_N, _ = self._placed
        buffers = self._keys[layer], self._values[layer]
        for buffer, new in zip(buffers, (keys, values), strict=True):
            buffer.transpose(1, 2)[slots_N, places_N] = new[0].transpose(0, 1)
        return buffers[0][:, :, : self._length], buffers[1][:, :, : self._length]

    def get_seq_length(self, layer: int = 0) -> int:
        return self._length

    def _mask(
        self, owners_SC: torch.Tensor, owners_SR: torch.Tensor, places_SR: torch.Tensor
    ) -> torch.Tensor:
        """Returns 0 where a query attends a token, else the least number, [S, 1, R, T].

        Not minus infinity: a request that writes nothing may attend nothing, and must not become
        NaN, which would spread through the spare token to others.
        """
        owners_S1T = owners_SC[:, None, : self._length]
        own_SRT = (owners_S1T == owners_SR[..., None]) & (
            self._columns_C[: self._length] <= places_SR[..., None]
        )
        attended_SRT = own_SRT | (owners_S1T == ALL)
        mask_SRT = torch.zeros(attended_SRT.shape, dtype=self._dtype, device=self._device)
        return mask_SRT.masked_fill_(~attended_SRT, torch.finfo(self._dtype).min)[:, None]

    # ------------------------------------------------------------ prompts

    def kept_length(self, slot: int, prefix: list[int]) -> int:
        """Returns how many tokens of a prefix the slot still holds: whole blocks."""
        return common_length(prefix, self._kept[slot]) // BLOCK * BLOCK

    def keep(self, slot: int, prefix: list[int]) -> None:
        """Notes what a slot begins with, so that it need not be read again."""
        self._kept[slot] = prefix[: len(prefix) // BLOCK * BLOCK]

    @torch.inference_mode()
    def begin(self, slot: int, shared: int, rests: Sequence[int]) -> list[int]:
        """Gives a slot to requests; returns where the rest of each one's prompt begins.

        All attend the first `shared` tokens; each has `rests` of its own behind them.
        """
        self._owners_SC[slot] = NOBODY
        self._owners_SC[slot, :shared] = ALL
        starts, end = [], shared
        for number, rest in enumerate(rests):
            starts.append(end)
            end += rest
            self._owners_SC[slot, starts[-1] : end] = number
        self._lengths[slot] = end
        return starts

    def prompts(self, slot: int) -> PromptCache:
        """Returns one slot, to read prompts into."""
        return PromptCache(
            self.shape.capacity,
            keys=[buffer[slot : slot + 1] for buffer in self._keys],
            values=[buffer[slot : slot + 1] for buffer in self._values],
        )

    @torch.inference_mode()
    def read_rests(
        self, model: Any, slot: int, requests: Sequence[RunningRequest], shared: int
    ) -> torch.Tensor:
        """Reads at once what a slot's prompts have after their prefix; returns the logits [R, V] of
        their last tokens."""
        ids: list[int] = []
        positions: list[int] = []
        owners: list[int] = []
        last: list[int] = []
        for number, request in enumerate(requests):
            ids += request.prompt[shared:]
            positions += range(shared, len(request.prompt))
            owners += [number] * (len(request.prompt) - shared)
            last.append(len(ids) - 1)
        states = torch.tensor([ids, positions, owners], device=self._device)
        ids_n, positions_n, owners_n = states
        places_n = torch.arange(shared, shared + len(ids), device=self._device)
        cache = self.prompts(slot)
        length = -(-(shared + len(ids)) // LENGTH_STEP) * LENGTH_STEP
        self._length = cache.length = min(length, self.shape.capacity)
        cache.places = places_n
        mask = self._mask(self._owners_SC[slot : slot + 1], owners_n[None], places_n[None])
        logits = torch.tensor(last, device=self._device)
        return forward(model, cache, ids_n, positions_n, mask, logits=logits)

    # ------------------------------------------------------------ other shapes

    def redivided(self, shape: SlotShape, *, slot: int, prefix: list[int]) -> SlotCache:
        """Returns slots of another shape, the first of which holds what `slot` keeps of a prefix.

        These give their buffers up layer by layer, so both are never held whole.
        """
        length = self.kept_length(slot, prefix)
        keys, values = (
            _redivided(buffers, shape, slot, length) for buffers in (self._keys, self._values)
        )
        other = SlotCache(shape, keys=keys, values=values)
        other.keep(0, prefix[:length])
        return other


def make_slots(shape: SlotShape, *, like: PromptCache) -> SlotCache:
    """Makes empty slots with as many layers and heads as a cache that a model has read into."""
    return SlotCache(
        shape,
        keys=[_zeros(shape, layer) for layer in like.keys],
        values=[_zeros(shape, layer) for layer in like.values],
    )


def _redivided(
    buffers: list[torch.Tensor], shape: SlotShape, slot: int, length: int
) -> list[torch.Tensor]:
    others = []
    while buffers:
        buffer = buffers.pop(0)
        others.append(_zeros(shape, buffer))
        others[-1][0, :, :length] = buffer[slot, :, :length]
    return others


def _zeros(shape: SlotShape, like: torch.Tensor) -> torch.Tensor:
    # Zeros: what is masked is multiplied by 0, and must be finite for that.
    size = (shape.num_slots, like.shape[1], shape.capacity, like.shape[3])
    return torch.zeros(size, dtype=like.dtype, device=like.device)
