from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_longpo.data.rows import parquet as reader
from megatron_longpo.data.rows.dataset import open_rows
from megatron_longpo.data.rows.sources import open_source
from megatron_longpo.data.rows.splits import EVALUATION_SPLITS, files_by_split
from megatron_longpo.errors import UserError
from tests.data.rows.row_files import assert_is_the_row, columns


def write(path: Path, values: Sequence[dict[str, Any]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(list(values)), path, **options)
    return path


def texts(path: Path, **options: Any) -> list[str]:
    source = open_source(str(path), **options)
    return [source.columns(index)["text"] for index in range(len(source))]


def write_names(folder: Path, *names: str) -> Path:
    """Writes a file for each name, with the name as its only row."""
    for name in names:
        write(folder / name, [{"text": name}])
    return folder


@pytest.mark.parametrize("name", ["run[1]", "run*", "run?", "{run,1}", "file:run", "a b%20"])
def test_a_path_is_no_pattern_and_no_address(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (name, "run1", "run"):
        write(tmp_path / folder / f"{folder}.parquet", [{"text": folder}])
    assert texts(tmp_path / name / f"{name}.parquet") == [name]
    assert texts(tmp_path / name) == [name]
    monkeypatch.chdir(tmp_path)
    assert texts(Path(name, f"{name}.parquet")) == [name]


def test_a_replaced_file_of_the_same_time_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    prints = set()
    for text in ("one", "two"):
        os.utime(write(path, [{"text": text}]), (1.7e9, 1.7e9))
        assert texts(path) == [text]
        prints.add(open_source(str(path)).fingerprint)
    assert len(prints) == 2


def test_a_file_that_is_replaced_after_opening_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", [{"text": "one"}])
    source = open_source(str(path))
    write(path, [{"text": "three"}, {"text": "four"}])
    with pytest.raises(UserError, match=r"rows.parquet: was replaced while it was read"):
        source.columns(0)


def test_the_fingerprint_is_that_of_the_files_bytes(tmp_path: Path) -> None:
    import hashlib

    write_names(tmp_path, "b.parquet", "a.parquet")
    content = b"".join((tmp_path / name).read_bytes() for name in ("a.parquet", "b.parquet"))
    expected = hashlib.blake2b(content, digest_size=16).hexdigest()
    assert open_source(str(tmp_path)).fingerprint == expected


def test_columns_that_nobody_reads_may_differ(tmp_path: Path) -> None:
    short = {name: value for name, value in columns().items() if not name.startswith("ref_")}
    write(tmp_path / "a.parquet", [{**columns(), "score": 1.5, "meta": {"by": "x"}}])
    write(tmp_path / "b.parquet", [{**short, "score": "high"}])
    parquet.write_table(pa.table({}), tmp_path / "empty.parquet")
    rows = open_rows(str(tmp_path))
    assert_is_the_row(rows[0])
    assert len(rows) == 2
    assert rows[1].reference_chosen == ()
    write(tmp_path / "c.parquet", [{k: v for k, v in short.items() if k != "chosen_labels"}])
    with pytest.raises(UserError, match=r"c.parquet: lacks the column chosen_labels; rows need"):
        open_rows(str(tmp_path))


@pytest.mark.parametrize("cache_bytes", [1, 256 << 20])
@pytest.mark.parametrize("whole_group_bytes", [1, 64 << 20])
def test_rows_are_found_in_any_order(
    tmp_path: Path, cache_bytes: int, whole_group_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "CACHE_BYTES", cache_bytes)
    monkeypatch.setattr(reader, "WHOLE_GROUP_BYTES", whole_group_bytes)
    monkeypatch.setattr(reader, "BATCH_BYTES", 100)
    for number, count in enumerate((10, 0, 23)):
        values = [{"text": f"{number}.{row}", "ids": [number, row]} for row in range(count)]
        table = pa.Table.from_pylist(
            values, pa.schema({"text": pa.string(), "ids": pa.list_(pa.int32())})
        )
        parquet.write_table(table, tmp_path / f"{number}.parquet", row_group_size=7)
    expected = [f"0.{row}" for row in range(10)] + [f"2.{row}" for row in range(23)]
    assert texts(tmp_path) == expected
    source = open_source(str(tmp_path))
    order = [32, 0, 9, 10, 10, 31, 5, 16, 17, 1]
    assert [source.columns(index)["text"] for index in order] == [expected[i] for i in order]
    assert source.columns(15)["ids"].tolist() == [2, 5]
    assert source.where(15) == f"{tmp_path}[15]"
    assert pickle.loads(pickle.dumps(source)).columns(32)["text"] == "2.22"
    with pytest.raises(IndexError):
        source.columns(33)


def test_large_row_groups_are_not_decoded_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "CACHE_BYTES", 1 << 16)
    monkeypatch.setattr(reader, "WHOLE_GROUP_BYTES", 1 << 16)
    monkeypatch.setattr(reader, "BATCH_BYTES", 1 << 15)
    path = write(tmp_path / "a.parquet", [{"ids": list(range(r, r + 1000))} for r in range(200)])
    decoded: list[int] = []
    decode = reader._decoded

    def counted(*args: Any, **options: Any) -> Any:
        for table in decode(*args, **options):
            decoded.append(table.nbytes)
            yield table

    monkeypatch.setattr(reader, "_decoded", counted)
    source = open_source(str(path))
    assert [int(source.columns(index)["ids"][0]) for index in range(200)] == list(range(200))
    assert max(decoded) < 2 << 15
    assert len(decoded) == 50  # rows in order are decoded once, 4 at a time


SPLITS = {
    "sharded": (
        ["data/train_sft-00000-of-00002.parquet", "data/test-00000-of-00001.parquet", "x.parquet"],
        {"train_sft": [0], "test": [1]},
    ),
    "sharded with a hash": (["data/train-00000-of-00001-a1b2.parquet"], {"train": [0]}),
    "folders": (
        ["a/train/0.parquet", "dev-set/test.parquet", "latest/0.parquet", "eval/train.parquet"],
        {"train": [0], "validation": [1], "test": [3]},
    ),
    "files": (
        ["train.parquet", "my_train_2.parquet", "valid-0.parquet", "testing.parquet", "z.parquet"],
        {"train": [0, 1], "validation": [2], "test": [3]},
    ),
    "no words": (["latest.parquet", "training2/trainer.parquet"], {"train": [1]}),
    "no splits": (["trainer.parquet", "part-00000-of-00001.parquet"], {"train": [0, 1]}),
}


@pytest.mark.parametrize("case", SPLITS)
def test_splits_are_those_of_datasets(case: str, tmp_path: Path) -> None:
    names, expected = SPLITS[case]
    write_names(tmp_path, *names)
    files = [tmp_path / name for name in names]
    found = files_by_split(files, tmp_path)
    assert found == {split: [files[i] for i in which] for split, which in expected.items()}

    from datasets.data_files import DataFilesDict, get_data_patterns

    theirs = DataFilesDict.from_patterns(get_data_patterns(str(tmp_path)), str(tmp_path))
    assert {split: sorted(map(str, which)) for split, which in found.items()} == {
        str(split): sorted(which) for split, which in theirs.items()
    }


def test_the_data_folder_itself_has_the_same_splits(tmp_path: Path) -> None:
    folder = write_names(
        tmp_path / "data", "train_sft-00000-of-00001.parquet", "train_dpo-00000-of-00001.parquet"
    )
    assert texts(folder, split="train_dpo") == ["train_dpo-00000-of-00001.parquet"]


def test_which_split_is_read(tmp_path: Path) -> None:
    folder = write_names(tmp_path / "set", "train-0.parquet", "test-0.parquet", "val-0.parquet")
    assert texts(folder) == ["train-0.parquet"]
    assert texts(folder, split="test") == ["test-0.parquet"]
    assert texts(folder, default_splits=EVALUATION_SPLITS) == ["val-0.parquet"]
    (folder / "val-0.parquet").unlink()
    assert texts(folder, default_splits=EVALUATION_SPLITS) == ["test-0.parquet"]
    with pytest.raises(UserError, match=r"set: has the splits train, test and none is called dev"):
        texts(folder, split="dev")
    (folder / "train-0.parquet").unlink()
    assert texts(folder) == ["test-0.parquet"]
    with pytest.raises(UserError, match=r"set: has the split test and none is called train"):
        texts(folder, split="train")
    with pytest.raises(UserError, match=r"split \(test\): .*test-0.parquet has no splits"):
        texts(folder / "test-0.parquet", split="test")


def test_hidden_files_and_backups_are_left_out(tmp_path: Path) -> None:
    left_out = [
        ".a.parquet",
        "_a.parquet",
        ".cache/a.parquet",
        "_temporary/0/a.parquet",
        "a.bak.parquet",
        "a.tmp.parquet",
        "a.partial.parquet",
        "a~.parquet",
        "old.bak/a.parquet",
        "a.parquet.bak",
        "a.parquet~",
    ]
    write_names(tmp_path, *left_out)
    with pytest.raises(UserError, match=r"all of its .parquet files are hidden or backups \(\.a"):
        texts(tmp_path)
    assert texts(tmp_path / ".a.parquet") == [".a.parquet"]
    write_names(tmp_path, "a.parquet", "part/b.parquet", "c.PARQUET")
    assert texts(tmp_path) == ["a.parquet", "c.PARQUET", "part/b.parquet"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    write_names(tmp_path / "blobs", "x.parquet")
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "data" / "train.parquet").symlink_to(tmp_path / "blobs" / "x.parquet")
    (tmp_path / "set" / "data" / "up").symlink_to(tmp_path / "set")
    assert texts(tmp_path / "set") == ["x.parquet"]
    (tmp_path / "blobs" / "x.parquet").unlink()
    with pytest.raises(UserError, match=r"data/train.parquet: not readable .*No such file"):
        texts(tmp_path / "set")


def test_the_cause_of_a_broken_file_is_named(tmp_path: Path) -> None:
    write_names(tmp_path, "a.parquet")
    broken = tmp_path / "b.parquet"
    for content, cause in (
        (b"", "0 bytes"),
        (b"PAR1 no table", "footer"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer.*git lfs pull"),
    ):
        broken.write_bytes(content)
        with pytest.raises(UserError, match=rf"b.parquet: not readable as Parquet \(.*{cause}"):
            texts(tmp_path)
    write(broken, [{"text": "x" * 1000}], compression="snappy")
    content = broken.read_bytes()
    broken.write_bytes(content[:4] + b"\xff" * 60 + content[64:])
    with pytest.raises(UserError, match=r"b.parquet: not readable as Parquet \("):
        texts(tmp_path)
