from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.data.rows.dataset import open_rows
from megatron_longpo.data.rows.schema import row_columns
from megatron_longpo.errors import UserError
from tests.data.rows.row_files import (
    EOS,
    SAVERS,
    Save,
    assert_is_the_row,
    columns,
    save_jsonl,
)


@pytest.mark.parametrize("save", SAVERS)
def test_every_source_gives_the_same_rows(save: Save, tmp_path: Path) -> None:
    # The public sets have further columns and no id.
    extra = {"chosen_lm_labels": [1, 2], "note": "x"}
    path = save([columns(**extra), columns(**extra)], tmp_path)
    rows = open_rows(path)
    assert len(rows) == 2
    for row in rows:
        assert_is_the_row(row)
    assert rows[1].id == rows[-1].id == "1"
    assert rows[1].source == (f"{path}:2" if save is save_jsonl else f"{path}[1]")
    with pytest.raises(IndexError):
        rows[2]


@pytest.mark.parametrize("save", SAVERS)
def test_fingerprint_follows_the_content_only(save: Save, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = save([columns()], tmp_path / "a")
    other = save([columns(chosen_attention_mask=[1] * 5 + [0] * 3)], tmp_path / "b")
    moved = tmp_path / "moved" / Path(first).name
    moved.parent.mkdir()
    if Path(first).is_dir():
        shutil.copytree(first, moved)
    else:
        shutil.copy(first, moved)
    for file in [moved, *moved.rglob("*")]:
        os.utime(file, (1e9, 1e9))
    assert open_rows(str(moved)).fingerprint == open_rows(first).fingerprint
    assert open_rows(other).fingerprint != open_rows(first).fingerprint


def without_short_rows(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in columns(**changes).items() if "ref_" not in name}


@pytest.mark.parametrize("save", SAVERS)
def test_short_rows_may_be_absent(save: Save, tmp_path: Path) -> None:
    rows = open_rows(save([without_short_rows(), without_short_rows()], tmp_path))
    for row in rows:
        assert row.reference_chosen == row.reference_rejected == ()
        assert row.chosen.input_ids.tolist() == columns()["chosen_input_ids"]
        assert [name for name, _ in row.named_rows()] == ["chosen_{}", "rejected_{}"]
        assert not any("ref_" in name for name in row_columns(row))


@pytest.mark.parametrize("save", SAVERS)
def test_rows_with_and_without_short_rows_may_be_mixed(save: Save, tmp_path: Path) -> None:
    # Arrow gives the second row nulls.
    nulls = {name: None for name in columns() if "ref_" in name}
    rows = open_rows(save([columns(), columns(**nulls)], tmp_path))
    assert_is_the_row(rows[0])
    assert rows[1].reference_chosen == rows[1].reference_rejected == ()


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list"])
def test_the_public_sets_columns(kind: str, tmp_path: Path) -> None:
    """int32 in Arrow, short rows padded to a rectangle, and columns that are not ours."""
    import datasets
    import pyarrow as pa

    def as_arrow(value: Any) -> Any:
        if not isinstance(value[0], list):
            return pa.array([value], pa.list_(pa.int32()))
        if kind == "fixed_size_list":
            return pa.array([value], pa.list_(pa.list_(pa.int32(), len(value[0]))))
        make = {"list": pa.list_, "large_list": pa.large_list}[kind]
        return pa.array([value], make(make(pa.int32())))

    padded = {
        "ref_rejected_input_ids": [[10, 12, 7, EOS], [13, 8, EOS, EOS]],
        "ref_rejected_attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]],
        "ref_rejected_labels": [[-100, -100, 7, EOS], [-100, 8, EOS, -100]],
        "chosen_lm_labels": [1] * 8,
        "rejected_lm_labels": [1] * 10,
    }
    table = pa.table({name: as_arrow(value) for name, value in columns(**padded).items()})
    datasets.Dataset(table).save_to_disk(str(tmp_path / "public"))
    rows = open_rows(str(tmp_path / "public"))
    assert_is_the_row(rows[0])
    assert rows[0].id == "0"


def test_jsonl_lines_are_counted_with_blank_ones_and_ids_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = ["", json.dumps(columns(id="ü-1")), "  ", json.dumps(columns(id=7)), "{broken"]
    path.write_text("\ufeff".join([lines[0], lines[1]]) + "\n" + "\n".join(lines[2:]))
    rows = open_rows(str(path))
    assert len(rows) == 3
    assert (rows[1].id, rows[1].source) == ("7", f"{path}:3")
    with pytest.raises(UserError, match=r"rows.jsonl:4: not a JSON object"):
        rows[2]
