from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.data.text.examples import Example, ExampleFile, Turn, write_examples
from megatron_longpo.errors import UserError

DOCUMENT = "Ä ledger.\n\nTwelve barrels.\n"


def turn(**changes: Any) -> dict[str, Any]:
    value = {
        "chunk": "Twelve barrels.",
        "chunk_span": [11, 26],
        "question": "How many?",
        "chosen": "Twelve.",
        "rejected": "None.",
    }
    return {**value, **changes}


def example(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "document": DOCUMENT, "turns": [turn()], **changes}


def write(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def test_write_and_read_again(tmp_path: Path) -> None:
    written = [
        Example(
            id=f"é{number}",
            document=DOCUMENT,
            turns=(Turn(chunk="x", chunk_span=None, question="q", chosen="c\u2028d", rejected=""),),
            meta={"seed": number},
        )
        for number in range(3)
    ]
    path = tmp_path / "examples.jsonl"
    assert write_examples(path, written) == 3
    read = ExampleFile(path)
    assert len(read) == 3
    for number, (left, right) in enumerate(zip(written, read, strict=True), start=1):
        assert right.source == f"{path}:{number}"
        assert (left.id, left.document, left.turns, left.meta) == (
            right.id,
            right.document,
            right.turns,
            right.meta,
        )


def test_spans_count_characters(tmp_path: Path) -> None:
    path = write(tmp_path / "e.jsonl", example(), example(turns=[turn(chunk_span=[12, 27])]))
    examples = ExampleFile(path)
    start, end = examples[0].turns[0].chunk_span or (0, 0)
    assert DOCUMENT[start:end] == "Twelve barrels."
    with pytest.raises(UserError, match=r"e.jsonl:2: turns\[0\]: document\[12:27\] is not the ch"):
        examples[1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"document": DOCUMENT, "turns": [turn()]}, "id is missing, must be a string"),
        (example(document=3), "document is int, must be a string"),
        (example(document=" "), "document is empty"),
        (example(document="x\ud800"), "document holds half of a surrogate pair at character 1"),
        (example(turns=[]), "turns must be a list of at least one turn"),
        (example(turns=["x"]), r"turns\[0\] must be an object"),
        (example(turns=[turn(), turn(chosen=None)]), r"turns\[1\]: chosen is NoneType, must be"),
        (example(turns=[turn(chunk_span=[0])]), r"turns\[0\]: chunk_span must be \[start, end\]"),
        (example(turns=[turn(chunk=" ")]), r"turns\[0\]: chunk is empty"),
        (
            example(turns=[turn(chunk=None, chunk_span=[20, 40])]),
            r"chunk_span \[20, 40\] lies outside the",
        ),
        (example(turns=[turn(chunk_span=[20, 40])]), r"chunk_span \[20, 40\] lies outside the"),
        (example(meta=[1]), "meta must be an object"),
    ],
)
def test_bad_examples_are_named(value: dict[str, Any], message: str, tmp_path: Path) -> None:
    examples = ExampleFile(write(tmp_path / "e.jsonl", example(), value))
    with pytest.raises(UserError, match=rf"e.jsonl:2: .*{message}|e.jsonl:2: {message}"):
        examples[1]


def test_empty_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"e.jsonl: holds no examples"):
        ExampleFile(write(tmp_path / "e.jsonl"))
