"""Samples: what `longpo inspect` shows of a row or example, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Mark = Literal["answer", "chunk"]
Branch = Literal["shared", "chosen", "rejected", "text"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A run of text of one kind."""

    text: str
    mark: Mark | None = None
    """answer = the tokens are labelled; chunk = a part of the document that a short row holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One node of a tree, or one text of an example."""

    name: str
    branch: Branch
    pieces: tuple[Piece, ...]
    start: int = 0
    """Position of its first token in the row; 0 for texts."""
    num_tokens: int | None = None
    """None for texts."""
    num_answer_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One row or example."""

    id: str
    source: str
    num_turns: int
    segments: tuple[Segment, ...]
    facts: tuple[str, ...]
    """Lines about the row's trees and pack."""


def marked(text: str, spans: Sequence[tuple[int, int]]) -> tuple[Piece, ...]:
    """Returns the text with the spans marked as chunks; overlapping spans become one."""
    pieces: list[Piece] = []
    position = 0
    for start, end in sorted(spans):
        start = max(start, position)
        if end <= start:
            continue
        if start > position:
            pieces.append(Piece(text=text[position:start]))
        if pieces and pieces[-1].mark == "chunk" and start == position:
            pieces[-1] = Piece(text=pieces[-1].text + text[start:end], mark="chunk")
        else:
            pieces.append(Piece(text=text[start:end], mark="chunk"))
        position = end
    if position < len(text) or not pieces:
        pieces.append(Piece(text=text[position:]))
    return tuple(pieces)
