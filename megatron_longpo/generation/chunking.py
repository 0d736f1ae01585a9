"""Chunks: consecutive blocks of a document, packed greedily up to a number of tokens."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_BORDERS = (
    re.compile(r"(?:\n[ \t\r]*)+\n"),  # blank lines: paragraphs, functions
    re.compile(r"\n"),
    re.compile(r"[.!?]\s+"),
    re.compile(r"\s+"),
)
"""Where a text may be split, the best first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """`document[start:end]`."""

    text: str
    start: int
    end: int


def chunk_document(
    text: str, *, count_tokens: Callable[[str], int], min_tokens: int, max_tokens: int
) -> list[Chunk]:
    """Packs blocks between blank lines into chunks of `min_tokens` to `max_tokens`.

    A block over `max_tokens` is split at lines, then sentences, words, characters. Packs under
    `min_tokens` are dropped. Tokens are counted block by block, which is never less than the whole
    by more than the borders.
    """
    chunks: list[Chunk] = []
    start = end = total = 0

    def close() -> None:
        if total >= min_tokens:
            # The indentation of a first line stays: it may be code.
            stripped = text[start:end].rstrip()
            left = start + len(stripped) - len(stripped.lstrip("\r\n"))
            chunks.append(
                Chunk(
                    text=text[left : start + len(stripped)], start=left, end=start + len(stripped)
                )
            )

    for block_start, block_end, num_tokens in _blocks(text, 0, len(text), count_tokens, max_tokens):
        if total and total + num_tokens > max_tokens:
            close()
            start, total = block_start, 0
        end = block_end
        total += num_tokens
    if total:
        close()
    return [chunk for chunk in chunks if chunk.text]


def _blocks(
    text: str,
    start: int,
    end: int,
    count_tokens: Callable[[str], int],
    max_tokens: int,
    level: int = 0,
) -> Iterator[tuple[int, int, int]]:
    """(start, end, tokens) of blocks that join up to `text[start:end]`, none over `max_tokens`."""
    if level == len(_BORDERS):
        borders = [(start + end) // 2]
    else:
        borders = [found.end() for found in _BORDERS[level].finditer(text, start, end)]
    points = [start, *(border for border in borders if start < border < end), end]
    for left, right in itertools.pairwise(points):
        num_tokens = count_tokens(text[left:right])
        if num_tokens <= max_tokens or right - left == 1:
            yield left, right, num_tokens
        else:
            next_level = min(level + 1, len(_BORDERS))
            yield from _blocks(text, left, right, count_tokens, max_tokens, next_level)
