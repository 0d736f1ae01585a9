from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.data.jsonl import dump_line
from megatron_longpo.data.rows.dataset import open_rows
from megatron_longpo.data.rows.schema import row_columns
from megatron_longpo.data.rows.writing import row_line, write_rows_jsonl
from tests.data.rows.row_files import assert_is_the_row, columns, write_lines


def test_write_and_read_again(tmp_path: Path) -> None:
    row = open_rows(write_lines(tmp_path / "a.jsonl", columns(id="x")))[0]
    assert write_rows_jsonl(tmp_path / "deep" / "b.jsonl", [row, row]) == 2
    again = open_rows(str(tmp_path / "deep" / "b.jsonl"))
    assert_is_the_row(again[1])
    assert again[1].id == "x"
    assert os.listdir(tmp_path / "deep") == ["b.jsonl"]


def test_lines_are_those_of_the_standard_library(tmp_path: Path) -> None:
    row = open_rows(write_lines(tmp_path / "a.jsonl", columns()))[0]
    for row_id in ("x", '"é\u2028\\ \x7f\n\x01'):
        named = replace(row, id=row_id)
        assert row_line(named).decode() == dump_line(row_columns(named))


def test_failed_write_keeps_the_file_before(tmp_path: Path) -> None:
    row = open_rows(write_lines(tmp_path / "a.jsonl", columns()))[0]
    before = (tmp_path / "a.jsonl").read_bytes()

    def rows() -> Any:
        yield row
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows_jsonl(tmp_path / "a.jsonl", rows())
    assert (tmp_path / "a.jsonl").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.jsonl"]
