"""Chunks: consecutive parts of a document, divided by its structure, up to a number of tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_longpo.config.names import DocumentKind
from megatron_longpo.generation.documents.structure import INNER, Borders, find_borders
from megatron_longpo.generation.documents.token_spans import TokenSpans

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+|[\u3002\uff01\uff1f]")
_SPACE = re.compile(r"\s+")
_BLANK_LINES = re.compile(r"(?:[^\S\n]*\n)+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """`document[start:end]`."""

    text: str
    start: int
    end: int
    first_token: int
    last_token: int
    """The document's tokens [first_token, last_token) overlap the chunk."""

    @property
    def num_tokens(self) -> int:
        return self.last_token - self.first_token


def chunk_document(
    text: str, *, tokens: TokenSpans, kind: DocumentKind = "text", min_tokens: int, max_tokens: int
) -> list[Chunk]:
    """Divides a document into chunks of `min_tokens` to `max_tokens`, each as long as possible.

    A chunk ends at the best border in its second half (a section rather than a paragraph), and of
    equal ones at the last. A block that is kept whole (code, a LaTeX environment, a class) moves to
    the next chunk if it fits into one, else it is divided at blank lines, lines, sentences, words,
    characters. Chunks under `min_tokens` are dropped.

    Tokens are counted within the document; a chunk tokenised alone may have a few more or fewer at
    its two ends.
    """
    chunks = []
    borders = find_borders(text, kind)
    for start, end in _parts(text, tokens, borders, min_tokens, max_tokens):
        left, right = _trimmed(text, start, end)
        if left == right:
            continue
        first, last = tokens.tokens_of(left, right)
        # Over the limit is a single character only, of more tokens than are allowed.
        if min_tokens <= last - first <= max_tokens:
            chunks.append(
                Chunk(
                    text=text[left:right],
                    start=left,
                    end=right,
                    first_token=first,
                    last_token=last,
                )
            )
    return chunks


def _parts(
    text: str, tokens: TokenSpans, borders: Borders, min_tokens: int, max_tokens: int
) -> Iterator[tuple[int, int]]:
    """Yields (start, end) of parts that join up to the text, none over `max_tokens`."""
    is_outer = borders.ranks < INNER
    outer = Borders(positions=borders.positions[is_outer], ranks=borders.ranks[is_outer])
    enough = min(max_tokens, max(min_tokens, (max_tokens + 1) // 2))
    start = 0
    while start < len(text):
        first, _ = tokens.tokens_of(start, start)
        if first + max_tokens >= len(tokens):
            yield start, len(text)
            return
        # A part may end anywhere in [least, most]. Its first token may begin before it.
        most = max(start + 1, int(tokens.starts[first + max_tokens]))
        least = min(most, max(start, int(tokens.starts[first + enough - 1])) + 1)
        end = _best_border(outer, least, most)
        if end is None:
            end = _before_whole_block(text, tokens, outer, start, least, most, max_tokens)
        if end is None:
            end = _best_border(borders, least, most)
        if end is None:
            end = _weak_border(text, least, most)
        yield start, end
        start = end


def _best_border(borders: Borders, least: int, most: int) -> int | None:
    """Returns the last of the best-ranked borders in [least, most]."""
    left = int(np.searchsorted(borders.positions, least, side="left"))
    right = int(np.searchsorted(borders.positions, most, side="right"))
    if left == right:
        return None
    from_the_end = borders.ranks[left:right][::-1]
    return int(borders.positions[right - 1 - int(np.argmin(from_the_end))])


def _before_whole_block(
    text: str,
    tokens: TokenSpans,
    outer: Borders,
    start: int,
    least: int,
    most: int,
    max_tokens: int,
) -> int | None:
    """Returns the border before a block that reaches past `most`, if the block fits a chunk."""
    at = int(np.searchsorted(outer.positions, least, side="left"))
    if at == 0 or int(outer.positions[at - 1]) <= start:
        return None
    before = int(outer.positions[at - 1])
    after = int(outer.positions[at]) if at < len(outer.positions) else len(text)
    left, right = _trimmed(text, before, after)
    return before if tokens.count(left, right) <= max_tokens else None


def _weak_border(text: str, least: int, most: int) -> int:
    """Returns the last end of a line in [least, most], else of a sentence, a word, else `most`."""
    line = text.rfind("\n", least - 1, most)
    if line >= 0:
        return line + 1
    ends = [found.end() for found in _SENTENCE_END.finditer(text, least - 1, most)]
    # Before the white space: many tokens begin with the space before a word.
    ends = ends or [found.start() for found in _SPACE.finditer(text, least, most + 1)]
    return ends[-1] if ends else most


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Takes white space off a span's ends; the indentation of a first line stays."""
    end = start + len(text[start:end].rstrip())
    if start == 0 or text[start - 1] == "\n":
        blank = _BLANK_LINES.match(text, start, end)
        return (blank.end() if blank else start), end
    return end - len(text[start:end].lstrip()), end
