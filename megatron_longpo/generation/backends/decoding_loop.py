"""The loop that writes tokens: continuous batching over slots, one document in each.

A document's requests wait until a slot is free, their prompts are read into it, and they join those
that are being written; when the last of them has ended, the slot is free for the next document. The
model runs in a thread, so that meanwhile others are tokenised and their answers checked.

With one slot, nothing but a document's own requests decides how its numbers are rounded: prompts
are read one by one, and a step computes the active requests alone.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_longpo.generation.backends.decode_graph import GraphedSteps
from megatron_longpo.generation.backends.kv_cache import PromptCache
from megatron_longpo.generation.backends.prefill import read_prompts
from megatron_longpo.generation.backends.running import RunningRequest, capacity, shared_length
from megatron_longpo.generation.backends.sampling import Sampler, draw
from megatron_longpo.generation.backends.slots import SlotCache, SlotShape, make_slots

GRAPHED_STEPS = 8
"""Tokens that a GPU writes for each request before they are looked at. What a request writes behind
its end within them is thrown away."""

MOST_MASKED = 8192**2
"""Largest mask under which the rests of a document's prompts are read together: queries by keys."""

CAPACITY_STEP = 256


@dataclass(kw_only=True, eq=False, slots=True)
class _Group:
    """Requests of one document that take a slot together."""

    requests: Sequence[RunningRequest]
    shared: int
    """Tokens that their prompts begin with."""
    capacity: int
    """Of the slot that holds them."""
    written: asyncio.Future[None]

    @property
    def prefix(self) -> list[int]:
        return self.requests[0].prompt[: self.shared]

    def active_requests(self) -> dict[int, RunningRequest]:
        return {n: request for n, request in enumerate(self.requests) if request.is_active}


class DecodingLoop:
    """Writes the answers to requests that any number of tasks hand in.

    `most_tokens` bounds the keys and values that are held, except that a group over it is alone.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_ids: frozenset[int],
        like: PromptCache,
        most_documents: int,
        most_tokens: int | None,
    ) -> None:
        self._model = model
        self._eos_ids = eos_ids
        self._like = like
        self._most_documents = most_documents
        self._most_tokens = most_tokens or sys.maxsize
        self._most_masked = MOST_MASKED if most_documents > 1 else 0
        self._uses_graphs = model.device.type == "cuda" and most_documents > 1
        self._steps = GRAPHED_STEPS if self._uses_graphs else 1
        self._waiting: deque[_Group] = deque()
        self._active: dict[int, _Group] = {}
        """By slot."""
        self._slots: SlotCache | None = None
        self._graphs: GraphedSteps | None = None
        self._work: asyncio.Task[None] | None = None

    async def write(self, requests: Sequence[RunningRequest]) -> None:
        """Fills `written` and `finished` of a document's requests.

        Raises:
            OutOfMemoryError: they do not fit in GPU memory even alone.
        """
        group = _Group(
            requests=requests,
            shared=shared_length(requests),
            capacity=-(-(capacity(requests) + 1) // CAPACITY_STEP) * CAPACITY_STEP,
            written=asyncio.get_running_loop().create_future(),
        )
        self._waiting.append(group)
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._write_all())
        await group.written

    def forget(self) -> None:
        """Frees the memory of keys and values."""
        self._slots = self._graphs = None

    # ------------------------------------------------------------ documents come and go

    async def _write_all(self) -> None:
        """Works until nothing is left; an error is raised in all tasks that wait."""
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
                self._divide(shape, self._waiting[0].prefix)
            slots = self._slots
            assert slots is not None
            free = [slot for slot in range(slots.shape.num_slots) if slot not in self._active]
            if not free:
                return
            group = self._waiting.popleft()
            slot = _best_slot(slots, free, group.prefix)
            self._active[slot] = group
            logits_RV = await read_prompts(
                self._model, slots, slot, group.requests, group.shared, self._most_masked
            )
            await asyncio.to_thread(self._write_first, group, logits_RV)
            self._leave()

    def _divide(self, shape: SlotShape, prefix: list[int]) -> None:
        """Makes slots of a shape; what is kept of the first document's prefix stays."""
        old = self._slots
        self.forget()
        slot = 0 if old is None else _best_slot(old, range(old.shape.num_slots), prefix)
        if old is not None and old.kept_length(slot, prefix):
            self._slots = old.redivided(shape, slot=slot, prefix=prefix)
        else:
            del old  # before the next are allocated
            self._slots = make_slots(shape, like=self._like)
        if self._uses_graphs:
            self._graphs = GraphedSteps(self._model, self._slots)

    def _wanted_shape(self) -> tuple[SlotShape, int]:
        """Returns slots for as many of those who wait, in turn, as fit together; and how many."""
        num_requests = tokens = taken = 0
        for group in self._waiting:
            larger = max(tokens, group.capacity)
            if taken and min(taken + 1, self._most_documents) * larger > self._most_tokens:
                break
            tokens, taken = larger, taken + 1
            num_requests = max(num_requests, len(group.requests))
        num_slots = max(1, min(self._most_documents, self._most_tokens // tokens))
        shape = SlotShape(num_slots=num_slots, num_requests=num_requests, capacity=tokens)
        return shape, taken

    def _leave(self) -> None:
        """Frees the slots of requests that have ended, or whose task has."""
        for slot, group in list(self._active.items()):
            if group.written.done() or not group.active_requests():
                del self._active[slot]
                if not group.written.done():
                    group.written.set_result(None)
        self._waiting = deque(group for group in self._waiting if not group.written.done())

    def _make_room(self, reason: str) -> None:
        """Halves what is held after memory was short; requests under way restart."""
        groups = list(self._active.values())
        shape = self._wanted_shape()[0] if self._slots is None else self._slots.shape
        self._active.clear()
        self.forget()
        torch.cuda.empty_cache()
        for group in groups:
            for request in group.requests:
                request.restart()
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

    # ------------------------------------------------------------ writing

    def _write_first(self, group: _Group, logits_RV: torch.Tensor) -> None:
        """Writes the first token of each request, from the logits of its prompt."""
        tokens = draw(logits_RV, _samplers(dict(enumerate(group.requests)))).tolist()
        for request, token in zip(group.requests, tokens, strict=True):
            request.write(token, self._eos_ids)

    def _write_some(self) -> None:
        """Writes a token of each request, or as many as can be before they are looked at."""
        slots, graphs = self._slots, self._graphs
        assert slots is not None
        active = [
            self._active[slot].active_requests() if slot in self._active else {}
            for slot in range(slots.shape.num_slots)
        ]
        # A graph has one width; without it, requests that have ended cost nothing.
        width = slots.shape.num_requests if graphs else max(map(len, active))
        requests = {
            slot * width + index: request
            for slot, of_slot in enumerate(active)
            for index, request in enumerate(of_slot.values())
        }
        left = min(one.sampling.max_new_tokens - len(one.written) for one in requests.values())
        steps = min(self._steps, left)
        length = slots.place(active, width=width, steps=steps)
        masked = len(active) > 1 or len(self._active[0].requests) > 1
        samplers = _samplers(requests)
        written = []
        for _ in range(steps):
            if graphs:
                logits_NV = graphs.step(length)
            else:
                logits_NV = slots.step(self._model, length, masked=masked)
            written.append(draw(logits_NV, samplers))
            slots.advance(written[-1])
        tokens = torch.stack(written).tolist()  # the one place where the GPU is waited for
        for index, request in requests.items():
            for step in range(steps):
                if request.is_active:
                    request.write(tokens[step][index], self._eos_ids)


def _best_slot(slots: SlotCache, free: Iterable[int], prefix: list[int]) -> int:
    """Returns the first of the slots that hold most of a prefix."""
    return max(free, key=lambda slot: (slots.kept_length(slot, prefix), -slot))


def _serves(there: SlotShape, wanted: SlotShape, num_groups: int) -> bool:
    """Returns whether slots are large enough, and not so large that many who wait have none."""
    return (
        there.capacity >= wanted.capacity
        and there.num_requests >= wanted.num_requests
        and there.num_slots * 2 > min(wanted.num_slots, num_groups)
    )


def _samplers(requests: dict[int, RunningRequest]) -> dict[int, Sampler]:
    return {
        index: (request.sampling, request.generator)
        for index, request in requests.items()
        if request.sampling.temperature > 0
    }
