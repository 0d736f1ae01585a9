"""The lengths of an example's texts, kept beside it so that reports need no tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleLengths:
    """Tokens of an example's texts; lists have an item for each turn, in order."""

    document: int
    chunk: list[int]
    question: list[int]
    chosen: list[int]
    rejected: list[int]
    position: list[float]
    """Place of a chunk's middle in its document: 0 = at its beginning, 1 = at its end."""
    kind: list[str]
    """What kind of question was asked."""

    @property
    def num_turns(self) -> int:
        return len(self.chosen)


TOKEN_COUNTS = tuple(
    field.name for field in fields(ExampleLengths) if field.name not in ("position", "kind")
)
"""The lengths in tokens, by name."""
