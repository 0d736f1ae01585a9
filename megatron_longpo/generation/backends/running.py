"""Requests of one document as token ids, and what they have in common."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megatron_longpo.generation.backends.base import Sampling

BLOCK = 2048
"""Prompts are read in blocks of this many tokens, which bounds the memory of activations.

Keys and values of whole blocks are kept between calls. A block's are bit for bit the same whether
it was read in this call or in an earlier one, so what is kept never changes an answer."""


@dataclass(kw_only=True, slots=True)
class RunningRequest:
    """A request with what was written for it so far, as tokens."""

    prompt: list[int]
    sampling: Sampling
    generator: torch.Generator
    seed: int
    written: list[int] = field(default_factory=list)
    finished: bool = False

    @property
    def most_tokens(self) -> int:
        return len(self.prompt) + self.sampling.max_new_tokens

    @property
    def is_active(self) -> bool:
        return not self.finished and len(self.written) < self.sampling.max_new_tokens

    def write(self, token: int, eos_ids: frozenset[int]) -> None:
        self.written.append(token)
        self.finished = token in eos_ids

    def restart(self) -> None:
        """Forgets what was written, so that the same tokens can be written again."""
        self.written.clear()
        self.finished = False
        self.generator.manual_seed(self.seed)


def shared_length(requests: Sequence[RunningRequest]) -> int:
    """Returns how many tokens all prompts begin with; of each, at least one is left to be read.

    Less than a block, such as a template's opening, counts as nothing.
    """
    first = requests[0].prompt
    length = min(common_length(first, request.prompt) for request in requests)
    length = min(length, min(len(request.prompt) for request in requests) - 1)
    return length if length >= BLOCK or len(requests) == 1 else 0


def common_length(left: list[int], right: list[int]) -> int:
    """Returns how many tokens two prompts begin with alike."""
    longest = min(len(left), len(right))
    if left[:longest] == right[:longest]:
        return longest
    return next(i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)


def capacity(requests: Sequence[RunningRequest]) -> int:
    """Returns how many tokens a cache must hold for these requests."""
    shared = shared_length(requests)
    return shared + sum(request.most_tokens - shared for request in requests)


def batches(
    requests: Sequence[RunningRequest], *, most_requests: int, most_tokens: int | None
) -> list[list[RunningRequest]]:
    """Splits consecutive requests into batches within both bounds; a larger request is alone."""
    parts: list[list[RunningRequest]] = []
    for request in requests:
        if (
            parts
            and len(parts[-1]) < most_requests
            and capacity([*parts[-1], request]) <= (most_tokens or sys.maxsize)
        ):
            parts[-1].append(request)
        else:
            parts.append([request])
    return parts
