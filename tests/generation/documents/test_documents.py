from __future__ import annotations

import gzip
import json
import os
import random
import resource
import sys
import time
from operator import length_hint
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.config.generate import GenerateConfig
from megatron_longpo.errors import UserError
from megatron_longpo.generation.documents import html
from megatron_longpo.generation.documents.reading import Document, DocumentSet, open_documents
from megatron_longpo.generation.documents.sources import ReadOptions
from megatron_longpo.generation.documents.structure import find_kind

PAGE = (
    "<?xml version='1.0'?>\n<!DOCTYPE html><html><head><title>t</title></head><body><h2>Tides</h2>"
    "<p>High <a href='x'>water</a>.</p><pre>a  b\n</pre><script>no()</script></body></html>"
)


def prose(seed: int, num_words: int = 400) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(3000)}" for _ in range(num_words))


def read(path: Path | str, **settings: Any) -> tuple[list[Document], dict[str, int]]:
    options = ReadOptions(**settings.pop("options", {}))
    documents = DocumentSet(str(path), options=options, **settings)
    return list(documents), dict(documents.dropped)


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


def test_bad_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"documents \(.*none\): no such file or folder"):
        DocumentSet(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"documents \(.*\): holds no files"):
        DocumentSet(str(tmp_path))
    with pytest.raises(UserError, match=r"documents \(.*\): no file or folder matches this"):
        DocumentSet(str(tmp_path / "*.md"))
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(UserError, match=r"split \(test\): .* has no splits"):
        DocumentSet(str(tmp_path), options=ReadOptions(split="test"))


def test_patterns(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("a.md", "b/c.md", "b/d.txt"):
        (tmp_path / name).write_text(name)
    assert [d.text for d in read(f"{tmp_path}/**/*.md")[0]] == ["a.md", "b/c.md"]
    assert [d.text for d in read(f"{tmp_path}/b*")[0]] == ["b/c.md", "b/d.txt"]


# ---------------------------------------------------------------- encodings and HTML


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "latin-1", "koi8-r"])
def test_encodings_are_found(encoding: str, tmp_path: Path) -> None:
    russian = "Прилив и отлив сменяют друг друга дважды в сутки, и вода уходит далеко. " * 9
    french = "À marée haute, l'eau recouvre l'île et les pêcheurs rentrent au port, déçus. " * 9
    # Where the first part is plain ASCII, the guess has to look further.
    text = "plain\n" * 20_000 + (russian if encoding == "koi8-r" else french)
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (document,), dropped = read(tmp_path)
    assert document.text == text and not dropped


def test_a_named_encoding_is_held_to(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xe9t\xe9")
    assert read(tmp_path, options={"encoding": "latin-1"})[0][0].text == "été"
    assert read(tmp_path, options={"encoding": "utf-8"})[1] == {"file not in utf-8": 1}


def test_bytes_of_no_encoding_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(random.Random(0).choices(range(1, 256), k=5000)))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfea")  # UTF-16 cut in half
    (tmp_path / "c.jsonl").write_text('{"text": "half \\ud83d a pair"}\n')
    documents, dropped = read(tmp_path)
    assert not documents
    assert sum(dropped.values()) == 3
    assert dropped["file not in utf-16, as its byte-order mark says"] == 1
    assert dropped["broken text (half of a surrogate pair)"] == 1


def test_html_is_dropped_extracted_or_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PAGE)
    (tmp_path / "b.txt").write_text("<div><p>no head</p>" + "<p>a fragment</p>\n" * 200 + "</div>")
    (tmp_path / "c.md").write_text(f"Markdown with a <b>few</b> tags. {prose(1, 60)}\n" * 100)
    assert read(tmp_path)[1] == {"HTML page": 2}
    page, fragment, markdown = read(tmp_path, html="extract")[0]
    assert page.text == "## Tides\n\nHigh water.\n\n```\na  b\n```\n"
    assert find_kind(page.text, page.name) == "markdown"
    assert "a fragment" in fragment.text and "<p>" not in fragment.text
    assert markdown.text.startswith("Markdown with a <b>")
    assert read(tmp_path, html="keep")[0][0].text == PAGE


def test_extraction_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setitem(sys.modules, "markdownify", None)
    with pytest.raises(UserError, match=r"html \(extract\): needs markdownify; pip install"):
        DocumentSet(str(tmp_path), html="extract")
    with pytest.raises(UserError):
        html.html_to_markdown(PAGE)


# ---------------------------------------------------------------- folders


def test_links_pipes_and_forbidden_files(tmp_path: Path) -> None:
    folder = tmp_path / "documents"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").write_text("a")
    (folder / "sub" / "up").symlink_to(folder)  # a loop
    (folder / "again").symlink_to(folder / "sub")  # the same folder, once more
    (folder / "gone.txt").symlink_to(folder / "nothing")
    (folder / "itself.txt").symlink_to(folder / "itself.txt")
    os.mkfifo(folder / "pipe")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("b")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    documents, dropped = read(folder)
    assert [d.text for d in documents] == ["a", "b"]
    assert dropped == {"broken link": 2, "neither file nor folder": 1}


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    documents = DocumentSet(str(tmp_path))

    def refuse(*_: Any) -> Any:
        raise PermissionError("no")

    # The tests may run as root, who may read anything.
    monkeypatch.setattr("megatron_longpo.generation.documents.sources._open", refuse)
    assert list(documents) == []
    assert documents.dropped == {"unreadable file": 2}


# ---------------------------------------------------------------- lines and tables


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


def test_dataset_folders(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    rows.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "both")
    assert [d.text for d in read(tmp_path / "plain")[0]] == ["one", "two"]
    assert [d.text for d in read(tmp_path / "both")[0]] == ["one", "two"]
    (test,) = read(tmp_path / "both", options={"split": "test"})[0]
    assert test.text == "two"
    assert length_hint(DocumentSet(str(tmp_path / "plain"))) == 2
    with pytest.raises(UserError, match=r"plain: has no column body, only text; set text_column"):
        DocumentSet(str(tmp_path / "plain"), options=ReadOptions(text_column="body"))
    with pytest.raises(UserError, match=r"both: has the splits train, test and none is called x"):
        DocumentSet(str(tmp_path / "both"), options=ReadOptions(split="x"))


def test_hub_datasets_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    load = datasets.load_dataset

    def local(name: str, subset: str | None, *, streaming: bool) -> Any:
        assert (name, streaming) == ("owner/name", True)
        if subset != "en":
            raise ValueError("Config name is missing. Please pick one among ['en', 'de']")
        return load("json", data_files=str(tmp_path / "rows.jsonl"), streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", local)
    documents, _ = read("owner/name", options={"subset": "en"})
    assert [(d.text, d.source) for d in documents] == [
        ("one", "owner/name[0]"),
        ("two", "owner/name[1]"),
    ]
    with pytest.raises(UserError, match=r"owner/name: has no column body, only text"):
        DocumentSet("owner/name", options=ReadOptions(text_column="body", subset="en"))
    with pytest.raises(UserError, match=r"subset \(null\): owner/name: Config name is missing"):
        DocumentSet("owner/name")
    with pytest.raises(UserError, match=r"subset \(en\): .* is no hub id; leave subset out"):
        DocumentSet(str(tmp_path / "rows.jsonl"), options=ReadOptions(subset="en"))


# ---------------------------------------------------------------- duplicates and shards


def test_near_duplicates_are_dropped_in_order(tmp_path: Path) -> None:
    first, other = prose(1), prose(2)
    words = first.split()
    close = " ".join([*words[:200], "changed", *words[201:]])  # 5 of 396 shingles differ
    far = " ".join([*words[:200], *other.split()[200:]])
    for name, text in (("a", first), ("b", close), ("c", far), ("d", other), ("e", "...")):
        (tmp_path / f"{name}.txt").write_text(text)
    documents = DocumentSet(str(tmp_path), near_duplicates=0.8)
    assert [Path(d.source).stem for d in documents] == ["a", "c", "d", "e"]
    assert documents.first_dropped["near-duplicate"] == (
        f"{tmp_path / 'b.txt'} (like {tmp_path / 'a.txt'})"
    )
    assert len(read(tmp_path, near_duplicates=None)[0]) == 5
    # At a tenth, halves count as alike.
    assert [Path(d.source).stem for d in read(tmp_path, near_duplicates=0.1)[0]] == ["a", "d", "e"]


def test_near_duplicates_in_scripts_without_spaces(tmp_path: Path) -> None:
    rng = random.Random(0)
    text = "".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(800))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(text[:400] + "変" + text[401:])
    (tmp_path / "c.txt").write_text(text[:200][::-1])
    assert read(tmp_path, near_duplicates=0.8)[1] == {"near-duplicate": 1}


def test_sketches_do_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_longpo.generation.documents import near_duplicates

    text = prose(3, 5000)
    whole = list(near_duplicates._shingles(text))
    monkeypatch.setattr(near_duplicates, "_BATCH", 100)
    assert list(near_duplicates._shingles(text)) == whole
    assert len(whole) == 4996


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


# ---------------------------------------------------------------- size


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


def test_near_duplicates_without_their_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setitem(sys.modules, "rensa", None)
    config = GenerateConfig(model="m", documents=str(tmp_path), output="o")
    with pytest.raises(UserError, match=r"near_duplicates \(0.8\): needs rensa .*near_duplicates:"):
        open_documents(config)
    config.near_duplicates = None
    assert len(list(open_documents(config))) == 1
