"""Requests of several documents written together: continuous batching over slots.

A document's requests wait until a slot is free, their prompts are read into it, and they join those
that are being written; when the last of them has ended, the slot is free for the next document.
The model runs in a thread, so that meanwhile others are tokenised and their answers checked.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_longpo.generation.backends.decode_graph import GraphedSteps
from megatron_longpo.generation.backends.kv_cache import RowCache, forward
from megatron_longpo.generation.backends.rows import BLOCK, Row, capacity, shared_length
from megatron_longpo.generation.backends.sampling import draw
from megatron_longpo.generation.backends.slots import SlotCache, SlotShape

STEPS = 8
"""Tokens that a GPU writes a row before they are looked at. What a row writes behind its end within
them is thrown away."""

MOST_MASKED = 8192**2
"""Largest mask under which the rests of a document's prompts are read together: queries by keys."""

CAPACITY_STEP = 256


@dataclass(kw_only=True, eq=False, slots=True)
class _Group:
    """Requests of one document, at most as many as a slot has rows."""

    rows: Sequence[Row]
    shared: int
    """Tokens that their prompts begin with."""
    capacity: int
    """Of the slot that holds them."""
    written: asyncio.Future[None]

    def active_rows(self) -> dict[int, Row]:
        return {index: row for index, row in enumerate(self.rows) if row.is_active}


class WriteTogether:
    """Writes rows that any number of tasks hand in.

    `most_tokens` bounds the keys and values that are held, except that a group over it is alone.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_ids: frozenset[int],
        like: RowCache,
        most_documents: int,
        most_tokens: int | None,
    ) -> None:
        self._model = model
        self._device = model.device
        self._eos_ids = eos_ids
        self._like = like
        self._most_documents = most_documents
        self._most_tokens = most_tokens or sys.maxsize
        self._steps = STEPS if self._device.type == "cuda" else 1
        self._waiting: deque[_Group] = deque()
        self._active: dict[int, _Group] = {}
        """By slot."""
        self._slots: SlotCache | None = None
        self._graphs: GraphedSteps | None = None
        self._work: asyncio.Task[None] | None = None

    async def write(self, rows: Sequence[Row]) -> None:
        """Fills `written` and `finished` of a document's rows.

        Raises:
            OutOfMemoryError: they do not fit in GPU memory even alone.
        """
        shared = shared_length(rows)
        group = _Group(
            rows=rows,
            shared=shared,
            capacity=-(-(capacity(rows) + 1) // CAPACITY_STEP) * CAPACITY_STEP,
            written=asyncio.get_running_loop().create_future(),
        )
        self._waiting.append(group)
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._write_all())
        await group.written

    def forget(self) -> None:
        """Gives the memory of keys and values back."""
        self._slots = self._graphs = None

    # ------------------------------------------------------------ documents come and go

    async def _write_all(self) -> None:
        """Works until nothing is left; what goes wrong is told to those who wait."""
        try:
            while self._waiting or self._active:
                try:
                    await self._admit()
                    if self._active:
                        await asyncio.to_thread(self._write_some)
                except torch.OutOfMemoryError as error:
                    self._make_room(str(error))
                self._leave()
                await asyncio.sleep(0)  # so that those who are answered may ask again
        except Exception as error:
            self._give_up(error)
        finally:
            self._give_up(None)

    async def _admit(self) -> None:
        """Reads the prompts of those who wait into slots, in turn, while there are free ones."""
        while self._waiting:
            shape, num_groups = self._wanted_shape()
            if self._slots is None or not _serves(self._slots.shape, shape, num_groups):
                if self._active:
                    return  # the slots are divided anew when they are empty
                self.forget()
                self._slots = SlotCache(shape, like=self._like)
                if self._device.type == "cuda":
                    self._graphs = GraphedSteps(self._model, self._slots)
            free = set(range(self._slots.shape.num_slots)) - self._active.keys()
            if not free:
                return
            group = self._waiting.popleft()
            self._active[min(free)] = group
            await asyncio.to_thread(self._read, self._slots, min(free), group)
            self._leave()

    def _wanted_shape(self) -> tuple[SlotShape, int]:
        """Slots for those who wait, as far down the queue as all of them fit together; how far."""
        num_rows = tokens = taken = 0
        for group in self._waiting:
            larger = max(tokens, group.capacity)
            if taken and min(taken + 1, self._most_documents) * larger > self._most_tokens:
                break
            tokens, taken = larger, taken + 1
            num_rows = max(num_rows, len(group.rows))
        num_slots = max(1, min(self._most_documents, self._most_tokens // tokens))
        return SlotShape(num_slots=num_slots, num_rows=num_rows, capacity=tokens), taken

    def _leave(self) -> None:
        """Frees the slots of those who have ended, or whose task has."""
        for slot, group in list(self._active.items()):
            if group.written.done() or not group.active_rows():
                del self._active[slot]
                if not group.written.done():
                    group.written.set_result(None)
        self._waiting = deque(group for group in self._waiting if not group.written.done())

    def _make_room(self, reason: str) -> None:
        """Memory was short: half as much from now on, and those under way begin anew."""
        groups = list(self._active.values())
        shape = self._wanted_shape()[0] if self._slots is None else self._slots.shape
        self._active.clear()
        self.forget()
        torch.cuda.empty_cache()
        for group in groups:
            for row in group.rows:
                row.restart()
        if shape.num_slots == 1:
            group = groups.pop() if groups else self._waiting.popleft()
            # A new error: the one that was raised keeps tensors alive.
            group.written.set_exception(torch.OutOfMemoryError(reason))
            return
        self._waiting.extendleft(reversed(groups))
        self._most_tokens = shape.num_slots * shape.capacity // 2
        print(
            f"warning: {shape.num_slots} documents of {shape.capacity:,} tokens do not fit in GPU "
            "memory together, and half of them are taken; set batch_tokens lower",
            file=sys.stderr,
        )

    def _give_up(self, error: Exception | None) -> None:
        for group in (*self._active.values(), *self._waiting):
            if group.written.done():
                continue
            if error is None:
                group.written.cancel()
            else:
                group.written.set_exception(error)
        self._active.clear()
        self._waiting.clear()

    # ------------------------------------------------------------ reading and writing

    def _read(self, slots: SlotCache, number: int, group: _Group) -> None:
        """Reads a document's prompts, and writes the first token of each row."""
        cache, shared = slots.slot(number), group.shared
        end = shared
        for row in group.rows:
            row.start = end
            end += row.most_tokens - shared
        self._read_behind(cache, group.rows[0].prompt[:shared])
        if sum(len(row.prompt) - shared for row in group.rows) * end <= MOST_MASKED:
            logits_RV = slots.read_rests(self._model, cache, group.rows, shared)
        else:
            # Behind the prefix, where they need no mask, and then to their places; the last row
            # first, since its place is behind all that the others are read to.
            logits = []
            for row in reversed(group.rows):
                cache.length = shared
                logits.append(self._read_behind(cache, row.prompt[shared:]))
                if row.start > shared:
                    cache.move(shared, len(row.prompt) - shared, row.start)
            logits_RV = torch.stack(logits[::-1])
        tokens = draw(logits_RV, _sampled(dict(enumerate(group.rows)))).tolist()
        for row, token in zip(group.rows, tokens, strict=True):
            row.write(token, self._eos_ids)

    def _read_behind(self, cache: RowCache, ids: list[int]) -> torch.Tensor:
        """Reads ids behind the cache in blocks; the logits [V] of the last."""
        logits_V = torch.empty(0)
        for start in range(0, len(ids), BLOCK):
            block = torch.tensor(ids[start : start + BLOCK], device=self._device)
            positions = torch.arange(len(block), device=self._device) + cache.length
            logits_V = forward(self._model, cache, block, positions, None, logits=1)[0]
            cache.length += len(block)
        return logits_V

    def _write_some(self) -> None:
        """A token a row, or as many as can be written before they are looked at."""
        slots, graphs = self._slots, self._graphs
        assert slots is not None
        shape = slots.shape
        rows = {
            slot * shape.num_rows + index: row
            for slot, group in self._active.items()
            for index, row in group.active_rows().items()
        }
        left = min(row.sampling.max_new_tokens - len(row.written) for row in rows.values())
        steps = min(self._steps, left)
        slots.place(rows, {slot: group.shared for slot, group in self._active.items()})
        length = max(group.capacity for group in self._active.values())
        sampled = _sampled(rows)
        written = []
        for _ in range(steps):
            logits_NV = graphs.step(length) if graphs else slots.step(self._model, length)
            written.append(draw(logits_NV, sampled))
            slots.advance(written[-1])
        tokens = torch.stack(written).tolist()  # the one place where the GPU is waited for
        for number, row in rows.items():
            for step in range(steps):
                if row.is_active:
                    row.write(tokens[step][number], self._eos_ids)


def _serves(there: SlotShape, wanted: SlotShape, num_groups: int) -> bool:
    """Whether slots are large enough, and not so large that many who wait have none."""
    return (
        there.capacity >= wanted.capacity
        and there.num_rows >= wanted.num_rows
        and there.num_slots * 2 > min(wanted.num_slots, num_groups)
    )


def _sampled(rows: dict[int, Row]) -> dict[int, Any]:
    return {
        number: (row.sampling, row.generator)
        for number, row in rows.items()
        if row.sampling.temperature > 0
    }
