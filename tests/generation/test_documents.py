from __future__ import annotations

from pathlib import Path

import pytest

from megatron_longpo.errors import UserError
from megatron_longpo.generation.documents import DocumentSet


def test_folder_gives_text_and_counts_the_rest(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.py").write_bytes("\ufeffx = 'é'\r\n".encode())
    (tmp_path / "a.md").write_text("# Title\n")
    (tmp_path / "again.md").write_text("# Title\n")
    (tmp_path / "binary.bin").write_bytes(b"ab\0cd")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "lines.jsonl").write_text('{"text": "first"}\n\n{"text": "second"}\n')
    documents = DocumentSet(str(tmp_path))
    assert [d.text for d in documents] == ["# Title\n", "x = 'é'\r\n", "first", "second"]
    assert dict(documents.dropped) == {
        "document given twice": 1,
        "binary file": 1,
        "file not in UTF-8": 1,
        "empty document": 1,
    }
    assert documents.first_dropped["binary file"] == str(tmp_path / "binary.bin")
    assert len(documents) == 8
    assert [d.source for d in documents][-1] == f"{tmp_path / 'lines.jsonl'}:3"


def test_ids_follow_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.jsonl").write_text('{"text": "same"}\n{"text": "other"}\n')
    (first,) = DocumentSet(str(tmp_path / "a.txt"))
    same, other = DocumentSet(str(tmp_path / "b.jsonl"))
    assert first.id == same.id != other.id


def test_limit(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert [d.text for d in DocumentSet(str(tmp_path), limit=1)] == ["one"]


def test_bad_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"documents \(.*none\): no such file or folder"):
        DocumentSet(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"documents \(.*\): holds no files"):
        DocumentSet(str(tmp_path))
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"body": "two"}\n')
    with pytest.raises(UserError, match=r"b.jsonl:2: text is missing or no string"):
        list(DocumentSet(str(tmp_path)))
