from __future__ import annotations

import gzip
import json
import resource
import time
from operator import length_hint
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.errors import UserError
from megatron_longpo.generation.documents.formats import ReadOptions
from megatron_longpo.generation.documents.reading import DocumentSet
from tests.generation.documents.documents import prose, read


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    documents = DocumentSet(str(tmp_path))

    def refuse(*_: Any) -> Any:
        raise PermissionError("no")

    # The tests may run as root, who may read anything.
    monkeypatch.setattr("megatron_longpo.generation.documents.formats._open", refuse)
    assert list(documents) == []
    assert documents.dropped == {"unreadable file": 2}


@pytest.mark.parametrize("packed", [False, True])
def test_broken_lines_are_dropped_and_named(tmp_path: Path, packed: bool) -> None:
    lines = ['{"body": "one"}', "{broken", "[1]", '{"body": 7}', "", '{"other": 1}']
    lines += ['{"body": "' + "x" * 9000 + '"}', '{"body": "two"}']
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    content = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    options = ReadOptions(text_column="body", max_bytes=2000)
    documents = DocumentSet(str(path), options=options)
    assert [d.text for d in documents] == ["one", "two"]
    assert [d.source for d in documents] == [f"{path}:1", f"{path}:8"]
    assert dict(documents.dropped) == {
        "line that is no JSON object": 2,
        "row without a text in body": 2,
        "document over max_document_bytes": 1,
    }
    assert documents.first_dropped["line that is no JSON object"] == f"{path}:2"
    assert documents.first_dropped["document over max_document_bytes"] == f"{path}:7"


def test_a_cut_archive_gives_what_it_has(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": prose(n)}) + "\n" for n in range(50)).encode()
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines)[:-2000])
    documents, dropped = read(path)
    assert 10 < len(documents) < 50
    assert dropped == {"unreadable file": 1}


def test_other_columns_are_named(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "a.jsonl").write_text('{"id": 1, "body": "two"}\n')
    with pytest.raises(UserError, match=r"a.jsonl:1: has no column text, only id, body; set text_"):
        DocumentSet(str(tmp_path))
    (tmp_path / "a.jsonl").unlink()
    parquet.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: has no column text, only id, body; set text"):
        DocumentSet(str(tmp_path))
    assert read(tmp_path, options={"text_column": "body"})[0][0].text == "x"


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    texts = [f"text {n}" for n in range(200)]
    parquet.write_table(pa.table({"text": [*texts, None], "n": range(201)}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no table")
    documents, dropped = read(tmp_path)
    assert [d.text for d in documents] == texts
    assert documents[7].source == f"{tmp_path / 'a.parquet'}[7]"
    assert dropped == {"row without a text in text": 1, "unreadable file": 1}
    assert length_hint(DocumentSet(str(tmp_path))) == 201


def test_a_huge_line_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "one"}\n{"text": "')
        for _ in range(20):
            file.write(b"word " * 200_000)
        file.write(b'"}\n{"text": "two"}\n')
    (tmp_path / "b.txt").write_bytes(b"x" * 20_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    documents, dropped = read(tmp_path, options={"max_bytes": 1_000_000})
    assert [d.text for d in documents] == ["one", "two"]
    assert dropped == {"document over max_document_bytes": 2}
    assert time.process_time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # KiB


def test_length_of_large_files_is_estimated(tmp_path: Path) -> None:
    line = json.dumps({"text": prose(1)}) + "\n"
    number = 1_600_000 // len(line)
    content = (line * number).encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    assert length_hint(DocumentSet(str(tmp_path))) == pytest.approx(number, rel=0.01)
    (tmp_path / "a.jsonl").unlink()
    packed = "".join(json.dumps({"text": prose(n)}) + "\n" for n in range(number)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(packed))
    assert length_hint(DocumentSet(str(tmp_path))) == pytest.approx(number, rel=0.2)
