"""Preference examples as text: what `generate` writes and `tokenize` reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_longpo.data.jsonl import JsonlFile, write_jsonl
from megatron_longpo.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One question about a document, with an answer from its chunk and one from the whole."""

    chunk: str | None
    """The part of the document that holds the evidence; None if there is no short context."""
    chunk_span: tuple[int, int] | None
    """[start, end) of the chunk in characters of the document; None if unknown."""
    question: str
    chosen: str
    """The answer given the chunk."""
    rejected: str
    """The answer given the whole document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A document and its turns."""

    id: str
    document: str
    turns: tuple[Turn, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    """`examples.jsonl:3` for messages; empty if the example was not read from a file."""


class ExampleFile:
    """The examples of a JSONL file by index, each checked on access."""

    def __init__(self, path: str | Path) -> None:
        self._file = JsonlFile(path)
        self.fingerprint = self._file.fingerprint
        if len(self._file) == 0:
            raise UserError(f"{path}: holds no examples; it needs at least one")

    def __len__(self) -> int:
        return len(self._file)

    def __getitem__(self, index: int) -> Example:
        return check_example(self._file[index], source=self._file.where(index))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


def check_example(value: Mapping[str, Any], *, source: str) -> Example:
    """Builds an example from an unchecked object; unknown keys are ignored."""
    document = _text(value, "document", source)
    turns = value.get("turns")
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{source}: turns must be a list of at least one turn")
    meta = value.get("meta") or {}
    if not isinstance(meta, dict):
        raise UserError(f"{source}: meta must be an object")
    return Example(
        id=_text(value, "id", source),
        document=document,
        turns=tuple(
            _check_turn(turn, document=document, source=f"{source}: turns[{number}]")
            for number, turn in enumerate(turns)
        ),
        meta=meta,
        source=source,
    )


def _check_turn(value: Any, *, document: str, source: str) -> Turn:
    if not isinstance(value, dict):
        raise UserError(f"{source} must be an object")
    chunk = None if value.get("chunk") is None else _text(value, "chunk", source)
    return Turn(
        chunk=chunk,
        chunk_span=_span(value.get("chunk_span"), chunk=chunk, document=document, source=source),
        question=_text(value, "question", source),
        chosen=_text(value, "chosen", source, may_be_empty=True),
        rejected=_text(value, "rejected", source, may_be_empty=True),
    )


def _text(value: Mapping[str, Any], key: str, source: str, *, may_be_empty: bool = False) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        kind = "missing" if key not in value else type(text).__name__
        raise UserError(f"{source}: {key} is {kind}, must be a string")
    if not may_be_empty and not text.strip():
        raise UserError(f"{source}: {key} is empty")
    check_unicode(text, key, source)
    return text


def check_unicode(text: str, key: str, source: str) -> None:
    """Raises if a text holds half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{source}: {key} holds half of a surrogate pair at character {error.start}; mend the "
            "text's encoding"
        ) from None


def _span(value: Any, *, chunk: str | None, document: str, source: str) -> tuple[int, int] | None:
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(isinstance(bound, int) and not isinstance(bound, bool) for bound in value)
    ):
        raise UserError(f"{source}: chunk_span must be [start, end] or null")
    start, end = value
    if not 0 <= start < end <= len(document):
        raise UserError(
            f"{source}: chunk_span [{start}, {end}] lies outside the document's "
            f"{len(document)} characters"
        )
    # White space may have been changed; any other difference means that the span is wrong.
    if chunk is not None and document[start:end].split() != chunk.split():
        raise UserError(
            f"{source}: document[{start}:{end}] is not the chunk; spans count characters, not bytes"
        )
    return start, end


def evidence_spans(example: Example) -> list[tuple[int, int]]:
    """Returns the spans of the chunks in the document; a chunk without a span is searched for."""
    spans = (evidence_span(example, turn) for turn in example.turns)
    return [span for span in spans if span is not None]


def evidence_span(example: Example, turn: Turn) -> tuple[int, int] | None:
    """Returns the span of a turn's chunk; None if there is no chunk or it is not found."""
    if turn.chunk_span is not None or turn.chunk is None:
        return turn.chunk_span
    start = example.document.find(turn.chunk)
    return None if start < 0 else (start, start + len(turn.chunk))


def example_columns(example: Example) -> dict[str, Any]:
    """Returns the example as the object of one line."""
    return {
        "id": example.id,
        "document": example.document,
        "turns": [
            {
                "chunk": turn.chunk,
                "chunk_span": None if turn.chunk_span is None else list(turn.chunk_span),
                "question": turn.question,
                "chosen": turn.chosen,
                "rejected": turn.rejected,
            }
            for turn in example.turns
        ],
        "meta": example.meta,
    }


def write_examples(path: str | Path, examples: Iterable[Example]) -> int:
    """Writes examples to a JSONL file (first beside it, then renamed). Returns their number."""
    return write_jsonl(path, (example_columns(example) for example in examples))
