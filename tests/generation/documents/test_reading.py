from __future__ import annotations

import gzip
import json
from operator import length_hint
from pathlib import Path

from megatron_longpo.generation.documents.formats import ReadOptions
from megatron_longpo.generation.documents.reading import DocumentSet
from tests.generation.documents.documents import prose

PAGE = (
    "<?xml version='1.0'?>\n<!DOCTYPE html><html><head><title>t</title></head><body><h2>Tides</h2>"
    "<p>High <a href='x'>water</a>.</p><pre>a  b\n</pre><script>no()</script></body></html>"
)


def test_folder_gives_text_and_counts_the_rest(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.py").write_bytes("\ufeffx = 'é'\r\n".encode())
    (tmp_path / "a.md").write_text("# Title\n")
    (tmp_path / "again.md").write_text("# Title\n")
    (tmp_path / "binary.bin").write_bytes(b"ab\0cd")
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "broken.txt.gz").write_bytes(gzip.compress(b"packed" * 99)[:-9])
    (tmp_path / "control.txt").write_bytes(b"\x01\x02 \x03 a")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "page.txt").write_text(PAGE)
    (tmp_path / "large.txt").write_text("x" * 2001)
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "lines.jsonl").write_text('{"text": "first"}\n\n{"text": "second"}\n')
    documents = DocumentSet(str(tmp_path), options=ReadOptions(max_bytes=2000))
    assert [d.text for d in documents] == ["# Title\n", "x = 'é'\r\n", "first", "second", "packed"]
    assert dict(documents.dropped) == {
        "document given twice": 1,
        "binary file": 2,
        "empty document": 1,
        "HTML page": 1,
        "document over max_document_bytes": 1,
        "unreadable file": 1,
    }
    assert documents.first_dropped["binary file"] == str(tmp_path / "binary.bin")
    assert length_hint(documents) == 12
    assert [d.source for d in documents][3] == f"{tmp_path / 'lines.jsonl'}:3"
    assert documents.dropped["binary file"] == 2  # counted anew


def test_ids_follow_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.jsonl").write_text('{"text": "same"}\n{"text": "other"}\n')
    (first,) = DocumentSet(str(tmp_path / "a.txt"))
    same, other = DocumentSet(str(tmp_path / "b.jsonl"))
    assert first.id == same.id != other.id


def test_limit(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert [d.text for d in DocumentSet(str(tmp_path), limit=1)] == ["one"]
    assert length_hint(DocumentSet(str(tmp_path), limit=1)) == 1


def test_shards_share_the_documents_out(tmp_path: Path) -> None:
    texts = [prose(n % 17) + f" {n}" * (n % 3 == 0) for n in range(60)]
    lines = [json.dumps({"text": text}) for text in texts]
    lines[10] = "broken"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    whole = DocumentSet(str(tmp_path), near_duplicates=0.8)
    everything = [(d.id, d.source) for d in whole]
    assert len(everything) == 17
    parts = [DocumentSet(str(tmp_path), near_duplicates=0.8, shard=(i, 4)) for i in range(4)]
    found = [[(d.id, d.source) for d in part] for part in parts]
    assert sorted(document for part in found for document in part) == sorted(everything)
    assert all(part == sorted(part, key=everything.index) for part in found)
    assert sum((part.dropped for part in parts), parts[0].dropped.__class__()) == whole.dropped
    assert [length_hint(part) for part in parts] == [15] * 4
