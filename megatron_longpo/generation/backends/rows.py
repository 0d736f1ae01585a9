"""Requests of one document as token ids, and what they have in common."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megatron_longpo.generation.backends.base import Sampling

BLOCK = 2048
"""Prompts are read in blocks of so many tokens, which bounds the memory of activations.

Keys and values of whole blocks are kept between calls. A block's are bit for bit the same whether
it was read in this call or in an earlier one, so what is kept never changes an answer."""


@dataclass(kw_only=True, slots=True)
class Row:
    """A request under way."""

    prompt: list[int]
    sampling: Sampling
    generator: torch.Generator
    seed: int
    start: int = 0
    """Where the row's own part of the prompt stands in the cache."""
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
        """As if nothing was written yet."""
        self.written.clear()
        self.finished = False
        self.generator.manual_seed(self.seed)


def shared_length(rows: Sequence[Row]) -> int:
    """How many tokens all prompts begin with, less at least one of each that is still to be read.

    Less than a block is not worth it: the few tokens of a template's opening.
    """
    first = rows[0].prompt
    length = min(common_length(first, row.prompt) for row in rows)
    length = min(length, min(len(row.prompt) for row in rows) - 1)
    return length if length >= BLOCK or len(rows) == 1 else 0


def common_length(left: list[int], right: list[int]) -> int:
    longest = min(len(left), len(right))
    if left[:longest] == right[:longest]:
        return longest
    return next(i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)


def capacity(rows: Sequence[Row]) -> int:
    """Tokens that a cache must hold for these rows."""
    shared = shared_length(rows)
    return shared + sum(row.most_tokens - shared for row in rows)


def batches(rows: Sequence[Row], *, most_rows: int, most_tokens: int | None) -> list[list[Row]]:
    """Consecutive rows within both bounds; a row over them is alone."""
    parts: list[list[Row]] = []
    for row in rows:
        if (
            parts
            and len(parts[-1]) < most_rows
            and capacity([*parts[-1], row]) <= (most_tokens or sys.maxsize)
        ):
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts
