"""Files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_longpo.data.jsonl import write_whole
from megatron_longpo.errors import UserError


def test_a_failed_write_leaves_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_whole(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_what_the_disk_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match=r"file\.txt: cannot be written \(") as error:
        write_whole(tmp_path / "taken" / "file.txt", "text")
    assert "\n" not in str(error.value)
