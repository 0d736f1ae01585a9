from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.data.rows.dataset import open_rows
from megatron_longpo.data.rows.sources import open_source
from megatron_longpo.errors import UserError
from tests.data.rows.row_files import (
    assert_is_the_row,
    columns,
    save_arrow,
    save_json,
    save_jsonl,
    write_lines,
)


def test_bad_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.jsonl: no such file"):
        open_rows(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match=r"empty.jsonl: holds no rows"):
        open_rows(write_lines(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match=r"neither a save_to_disk folder nor"):
        open_rows(str(tmp_path))
    (tmp_path / "broken.json").write_text('[{"id": 1},\n')
    with pytest.raises(UserError, match=r"broken.json: not a JSON list of objects \(.*line 2"):
        open_rows(str(tmp_path / "broken.json"))
    (tmp_path / "numbers.json").write_text("[1]")
    with pytest.raises(UserError, match=r"numbers.json\[0\]: is a JSON int, must be an object"):
        open_rows(str(tmp_path / "numbers.json"))[0]
    path = save_arrow([{"text": "x"}], tmp_path)
    with pytest.raises(UserError, match=r"arrow: lacks the column chosen_input_ids.*tokenize"):
        open_rows(path)
    with pytest.raises(UserError, match=r"arrow\[0\]: chosen_input_ids must be a flat list"):
        shutil.rmtree(path)
        open_rows(save_arrow([columns(chosen_input_ids=[1, None])], tmp_path))[0]
    (tmp_path / "arrow" / "data-00000-of-00001.arrow").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"arrow: not readable as a dataset folder"):
        open_rows(path)
    with pytest.raises(UserError, match=r"list.jsonl:1: holds a JSON list, must be an object"):
        open_rows(write_lines(tmp_path / "list.jsonl", [1]))[0]
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9\xff"}\n')
    with pytest.raises(UserError, match=r"latin.jsonl:1: not UTF-8 text"):
        open_rows(str(tmp_path / "latin.jsonl"))[0]


def test_splits(tmp_path: Path) -> None:
    import datasets

    parts = {name: datasets.Dataset.from_list([columns(id=name)]) for name in ("a", "b")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(UserError, match=r"two: has the splits a, b and none is called train"):
        open_rows(str(tmp_path / "two"))
    assert open_source(str(tmp_path / "two"), split="b").columns(0)["id"] == "b"
    with pytest.raises(UserError, match=r"two: .* none is called c; give the folder of one split"):
        open_source(str(tmp_path / "two"), split="c")
    for save in (save_jsonl, save_json, save_arrow):
        with pytest.raises(UserError, match=r"split \(b\): .* has no splits; leave split out"):
            open_source(save([columns()], tmp_path), split="b")


def test_hub_ids_go_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    splits = {"train": datasets.Dataset.from_list([columns()])}
    asked: list[str] = []

    def load(hub_id: str) -> Any:
        asked.append(hub_id)
        if hub_id == "owner/name-tokenized":
            return datasets.DatasetDict(splits)
        raise ConnectionError("no way\nthere")

    monkeypatch.setattr(datasets, "load_dataset", load)
    row = open_rows("owner/name-tokenized")[0]
    assert_is_the_row(row)
    assert row.source == "owner/name-tokenized[0]"
    with pytest.raises(UserError, match=r"owner/x: no such file or folder here, .*no way there"):
        open_rows("owner/x")
    assert asked == ["owner/name-tokenized", "owner/x"]
