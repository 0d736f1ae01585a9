"""Keys and values of several documents under way, each in a slot, that write tokens together.

S slots of R rows and C tokens. In a slot stands what its document's prompts begin with, then a run
for each row, as long as the row may become:

    shared prefix | rest of prompt 0, its new tokens | rest of prompt 1, its new ... | ... | spare

So a row attends two intervals, and documents come and go without any key being moved. The spare
token at the end is where rows that have nothing to write put theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_longpo.generation.backends.kv_cache import RowCache, forward
from megatron_longpo.generation.backends.rows import Row

LENGTH_STEP = 256
"""Attention goes over a multiple of so many tokens: as far as the fullest slot reaches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotShape:
    """How the room for keys and values is divided."""

    num_slots: int
    num_rows: int
    """Of a slot."""
    capacity: int
    """Tokens of a slot, the spare one too."""


class SlotCache:
    """What a transformers model writes keys and values to while it writes one token a row.

    Two buffers a layer, [S, H, C, D]; the five numbers of each row are on the device, so that
    nothing is waited for between two tokens.
    """

    is_compileable = False

    def __init__(self, shape: SlotShape, *, like: RowCache) -> None:
        self.shape = shape
        # Zeros: what is masked is multiplied by 0, and must be finite for that.
        self._keys = [_zeros(shape, layer) for layer in like.keys]
        self._values = [_zeros(shape, layer) for layer in like.values]
        self._device, self._dtype = like.keys[0].device, like.keys[0].dtype
        num_rows = shape.num_slots * shape.num_rows
        self._slots_N = torch.arange(num_rows, device=self._device) // shape.num_rows
        self._columns_C = torch.arange(shape.capacity, device=self._device)
        self._state = torch.zeros((5, num_rows), dtype=torch.long, device=self._device)
        self._writing_N = torch.zeros(num_rows, dtype=torch.long, device=self._device)
        self._length = shape.capacity

    # ------------------------------------------------------------ one token a row

    @torch.inference_mode()
    def place(self, rows: dict[int, Row], shared: dict[int, int]) -> None:
        """Says which rows write (by number, slot by slot), and how long each slot's prefix is."""
        spare = self.shape.capacity - 1
        idle = [0, 0, 0, spare, spare]
        columns = [idle] * self._state.shape[1]
        for number, row in rows.items():
            prefix = shared[number // self.shape.num_rows]
            behind = len(row.written) - 1
            columns[number] = [
                row.written[-1],
                len(row.prompt) + behind,
                prefix,
                row.start,
                row.start + len(row.prompt) - prefix + behind,
            ]
        self._state.copy_(torch.tensor(columns).T)
        writing = [int(number in rows) for number in range(len(columns))]
        self._writing_N.copy_(torch.tensor(writing))

    @torch.inference_mode()
    def advance(self, tokens_N: torch.Tensor) -> None:
        """Each row's next token was chosen."""
        ids_N, positions_N, _, _, places_N = self._state
        ids_N.copy_(tokens_N)
        positions_N += self._writing_N
        places_N += self._writing_N

    @torch.inference_mode()
    def step(self, model: Any, length: int) -> torch.Tensor:
        """Logits [N, V] behind each row's last token; no row has more than `length` tokens."""
        self._length = self._rounded(length)
        ids_N, positions_N, shared_N, starts_N, places_N = self._state
        mask_NT = self._mask(shared_N, starts_N, places_N)
        mask = mask_NT.view(self.shape.num_slots, 1, self.shape.num_rows, -1)
        return forward(model, self, ids_N, positions_N, mask, logits=len(ids_N))

    def _rounded(self, length: int) -> int:
        return min(-(-length // LENGTH_STEP) * LENGTH_STEP, self.shape.capacity)

    def _mask(
        self, shared_n: torch.Tensor, starts_n: torch.Tensor, places_n: torch.Tensor
    ) -> torch.Tensor:
        """Of queries that stand at `places`: 0 or the least number there is, [n, T].

        Not minus infinity: a row that has nothing to write may attend nothing, and must not
        become NaN, which would spread through the spare token to others.
        """
        columns_T = self._columns_C[: self._length]
        own_nT = (columns_T >= starts_n[:, None]) & (columns_T <= places_n[:, None])
        attended_nT = own_nT | (columns_T < shared_n[:, None])
        mask_nT = torch.zeros(attended_nT.shape, dtype=self._dtype, device=self._device)
        return mask_nT.masked_fill_(~attended_nT, torch.finfo(self._dtype).min)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes [1, H, N, D], a token a row; returns all of [S, H, T, D]."""
        places_N = self._state[4]
        buffers = self._keys[layer], self._values[layer]
        for buffer, new in zip(buffers, (keys, values), strict=True):
            buffer.transpose(1, 2)[self._slots_N, places_N] = new[0].transpose(0, 1)
        return buffers[0][:, :, : self._length], buffers[1][:, :, : self._length]

    def get_seq_length(self, layer: int = 0) -> int:
        return self._length

    # ------------------------------------------------------------ prompts

    def slot(self, number: int) -> RowCache:
        """One slot, to read prompts into."""
        return RowCache(
            self.shape.capacity,
            keys=[buffer[number : number + 1] for buffer in self._keys],
            values=[buffer[number : number + 1] for buffer in self._values],
        )

    @torch.inference_mode()
    def read_rests(
        self, model: Any, cache: RowCache, rows: Sequence[Row], shared: int
    ) -> torch.Tensor:
        """Reads at once what the prompts of a slot have after its prefix; the logits [R, V] of
        their last tokens."""
        ids: list[int] = []
        states: list[tuple[int, int, int]] = []
        last: list[int] = []
        for row in rows:
            ids += row.prompt[shared:]
            for position in range(shared, len(row.prompt)):
                states.append((position, row.start, row.start + position - shared))
            last.append(len(ids) - 1)
        positions_n, starts_n, places_n = torch.tensor(states, device=self._device).T
        self._length = cache.length = self._rounded(states[-1][2] + 1)
        mask = self._mask(torch.full_like(starts_n, shared), starts_n, places_n)[None, None]
        cache.places = places_n
        try:
            return forward(
                model,
                cache,
                torch.tensor(ids, device=self._device),
                positions_n,
                mask,
                logits=torch.tensor(last, device=self._device),
            )
        finally:
            cache.places = None


def _zeros(shape: SlotShape, like: torch.Tensor) -> torch.Tensor:
    size = (shape.num_slots, like.shape[1], shape.capacity, like.shape[3])
    return torch.zeros(size, dtype=like.dtype, device=like.device)
