"""Reading the prompts of a document into its slot."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch

from megatron_longpo.generation.backends.kv_cache import PromptCache, forward
from megatron_longpo.generation.backends.running import BLOCK, RunningRequest
from megatron_longpo.generation.backends.slots import SlotCache


async def read_prompts(
    model: Any,
    slots: SlotCache,
    slot: int,
    requests: Sequence[RunningRequest],
    shared: int,
    most_masked: int,
) -> torch.Tensor:
    """Reads prompts that begin with the same `shared` tokens; returns the logits [R, V] of their
    last tokens.

    What the slot has kept of the shared tokens is not read again. What follows them is read at once
    if its mask has at most `most_masked` numbers, else prompt by prompt.
    """
    rests = [request.prompt[shared:] for request in requests]
    starts = slots.begin(slot, shared, [len(rest) for rest in rests])
    prefix = requests[0].prompt[:shared]
    cache = slots.prompts(slot)
    cache.length = slots.kept_length(slot, prefix)
    slots.keep(slot, prefix[: cache.length])  # no more until all is read
    await _read_behind(model, cache, prefix[cache.length :])
    slots.keep(slot, prefix)
    num_new = sum(map(len, rests))
    if num_new * (shared + num_new) <= most_masked:
        return await asyncio.to_thread(slots.read_rests, model, slot, requests, shared)
    # Each is read right behind the prefix, where it needs no mask, and then moved to its place. The
    # last goes first: its place is behind all that the others are read to.
    logits = []
    for start, rest in reversed(list(zip(starts, rests, strict=True))):
        cache.length = shared
        logits.append(await _read_behind(model, cache, rest))
        if start > shared:
            cache.move(shared, len(rest), start)
    return torch.stack(logits[::-1])


async def _read_behind(model: Any, cache: PromptCache, ids: list[int]) -> torch.Tensor:
    """Reads ids behind the cache in blocks; returns the logits [V] of the last.

    Each block is a call of its own, so that a stop signal waits for no more than one.
    """
    logits_V = torch.empty(0)
    for start in range(0, len(ids), BLOCK):
        logits_V = await asyncio.to_thread(_read_block, model, cache, ids[start : start + BLOCK])
    return logits_V


def _read_block(model: Any, cache: PromptCache, ids: list[int]) -> torch.Tensor:
    device = cache.keys[0].device
    ids_n = torch.tensor(ids, device=device)
    positions_n = torch.arange(len(ids), device=device) + cache.length
    logits_V = forward(model, cache, ids_n, positions_n, None, logits=1)[0]
    cache.length += len(ids)
    return logits_V
