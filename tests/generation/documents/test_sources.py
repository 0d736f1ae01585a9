from __future__ import annotations

import os
from operator import length_hint
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.errors import UserError
from megatron_longpo.generation.documents.formats import ReadOptions
from megatron_longpo.generation.documents.reading import DocumentSet
from tests.generation.documents.documents import read


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
