from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.config.generate import GenerateConfig
from megatron_longpo.errors import UserError
from megatron_longpo.generation.documents.reading import Document
from megatron_longpo.generation.questions.instructions import Instructions, read_instructions

TEXT = "The harbour is old.\n\nIt was founded in 1843 by twelve men who sold salt.\n\nThe end.\n"
DOCUMENT = Document(id="abc", text=TEXT, source="corpus/harbour.txt", place=0)


def instructions(**changes: Any) -> Instructions:
    return Instructions(GenerateConfig(model="m", documents="d", output="o", **changes))


def test_text_file(tmp_path: Path) -> None:
    path = tmp_path / "questions.txt"
    path.write_text("\ufeffSum up.\n\n What is new?\n")
    assert read_instructions(str(path)) == (["Sum up.", "What is new?"], {})
    path.write_text("\n")
    with pytest.raises(UserError, match=r"instructions \(.*\): holds no instruction"):
        read_instructions(str(path))
    with pytest.raises(UserError, match=r"instructions \(modle\): neither model, template nor pl"):
        read_instructions("modle")


@pytest.mark.parametrize("name", ["abc", "corpus/harbour.txt", "harbour.txt"])
def test_questions_of_single_documents(tmp_path: Path, name: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(
        '{"question": "Sum up."}\n\n'
        f'{{"question": "Who sold salt?", "document_id": "{name}"}}\n'
        '{"question": "Other?", "document_id": "other"}\n'
    )
    source = instructions(instructions=str(path))
    assert not source.asks_model
    prepared = source.prepare(TEXT, [(0, len(TEXT))], random.Random(0))
    assert prepared.document == TEXT
    asked = source.choose(prepared, 0, DOCUMENT, random.Random(0))
    assert asked is not None
    assert (asked.question, asked.kind, asked.answer) == ("Who sold salt?", "file", ())
    stranger = Document(id="x", text=TEXT, source="x", place=0)
    asked = source.choose(prepared, 0, stranger, random.Random(0))
    assert asked is not None and asked.question == "Sum up."
    path.write_text('{"question": "Other?", "document_id": "other"}\n')
    source = instructions(instructions=str(path))
    assert source.choose(prepared, 0, stranger, random.Random(0)) is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("What?", r"questions.jsonl:1\): not a JSON object"),
        ('{"text": "What?"}', r"questions.jsonl:1\): question is missing or no text"),
        ('["What?"]', r"questions.jsonl:1\): question is missing or no text"),
        ('{"question": "What?", "document_id": 3}', r"document_id \(3\) must be text"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        read_instructions(str(path))


def test_found_facts() -> None:
    source = instructions(instructions="template", fact_kinds=["missing_number"])
    prepared = source.prepare(TEXT, [(0, len(TEXT))], random.Random(0))
    asked = source.choose(prepared, 0, DOCUMENT, random.Random(0))
    assert asked is not None and asked.answer == ("1843",)
    source = instructions(instructions="template", fact_kinds=["class_base"])
    assert source.choose(prepared, 0, DOCUMENT, random.Random(0)) is None


def test_planted_facts() -> None:
    spans = [(0, 40), (40, len(TEXT))]
    source = instructions(instructions="planted", fact_split="test")
    prepared = source.prepare(TEXT, spans, random.Random(0))
    for index, (start, end) in enumerate(prepared.spans):
        asked = source.choose(prepared, index, DOCUMENT, random.Random(0))
        assert asked is not None
        assert asked.kind in ("serial_number", "donor", "deadline", "two_hop_person", "cheaper")
        assert all(word in prepared.document[start:end] for word in asked.answer)
    assert prepared == source.prepare(TEXT, spans, random.Random(0))


def test_written_questions() -> None:
    three = "1. What is old here?\n2. Who sold the salt?\n3. When did it end?"
    assert instructions().written(three, random.Random(0)) is None
    written = instructions(least_questions=2).written(three, random.Random(0))
    assert written is not None and written.kind == "model" and written.question in three


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"instructions": "planted", "fact_kinds": ["donor"]},
            r"fact_kinds \(donor\): no such kind here",
        ),
        (
            {"instructions": "planted", "fact_split": "test", "fact_kinds": ["donors"]},
            r"fact_kinds \(donors\): no such kind here. There is donor$",
        ),
    ],
)
def test_bad_kinds_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        instructions(**changes)
