from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_longpo.errors import UserError
from megatron_longpo.generation import generate
from megatron_longpo.generation.shards import files as shards
from megatron_longpo.generation.shards.files import Record, Shard, ShardWriter, parse_shard
from tests.generation.scripted import Install, by_length, settings, whole_file


def test_damage_inside_a_shard_is_named(
    many_documents: str, tmp_path: Path, scripted: Install
) -> None:
    scripted(by_length)
    config = settings("m", many_documents, tmp_path, shard="0/2")
    generate.run_generate(config)
    shard = tmp_path / "examples.jsonl.partial" / "shard-0-of-2.jsonl"
    lines = shard.read_bytes().splitlines(keepends=True)
    shard.write_bytes(lines[0] + b"\0" * 10 + b"\n" + b"".join(lines[2:]))
    with pytest.raises(UserError, match=r"shard-0-of-2.jsonl:2: is damaged \(.*\); remove"):
        generate.run_generate(config)


def test_a_reason_may_hold_anything(tmp_path: Path) -> None:
    reason = 'HTTP 500: {"error":1,"example":2}\n'
    with ShardWriter(tmp_path / "shard.jsonl") as file:
        file.append(Record(number=3, id="x", dropped={reason: 2}), None)
    with ShardWriter(tmp_path / "shard.jsonl") as file:
        assert file.done[3].dropped == {reason: 2}


def test_a_full_disk_keeps_what_is_finished(
    many_documents: str, tmp_path: Path, scripted: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = whole_file(many_documents, tmp_path, scripted)
    room = 8000
    write = os.write

    def filling(descriptor: int, data: bytes) -> int:
        nonlocal room
        taken = write(descriptor, data[: min(room, 700)])
        room -= taken
        if taken == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return taken

    config = settings("m", many_documents, tmp_path)
    scripted(by_length)
    monkeypatch.setattr(shards.os, "write", filling)
    message = r"shard-0-of-1.jsonl: cannot be written \(No space left on device\); what is finished"
    with pytest.raises(UserError, match=message):
        generate.run_generate(config)
    shard = tmp_path / "examples.jsonl.partial" / "shard-0-of-1.jsonl"
    assert shard.read_bytes().endswith(b"\n")
    monkeypatch.undo()
    backend = scripted(by_length)
    summary = generate.run_generate(config)
    assert summary.num_resumed >= 2
    assert len(backend.prompts) < 28
    assert (tmp_path / "examples.jsonl").read_bytes() == whole


FULL_DISK = """
import resource, sys
from pathlib import Path
from megatron_longpo.data.jsonl import write_jsonl
from megatron_longpo.errors import UserError
from megatron_longpo.generation.shards.files import Record, ShardWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with ShardWriter(Path(sys.argv[1])) as file:
    try:
        for number in range(100):
            file.append(Record(number=number, id="x" * 4000), None)
    except UserError as error:
        print(error)
for number in (10, 99):
    try:
        write_jsonl(sys.argv[2], [{"text": "x" * 10_001}] * number)
    except UserError as error:
        print(error)
"""


def test_a_limit_met_in_the_middle_of_a_line_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "shard.jsonl"
    finished = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path), str(tmp_path / "whole.jsonl")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout.count("cannot be written (File too large)") == 3
    assert [one.name for one in tmp_path.iterdir()] == ["shard.jsonl"]
    assert 90_000 < path.stat().st_size < 100_000
    with ShardWriter(path) as file:
        assert sorted(file.done) == list(range(len(file.done)))


def test_a_shard_is_read_from_its_text() -> None:
    assert parse_shard(None) == Shard(index=0, count=1)
    assert parse_shard("7/8") == Shard(index=7, count=8)
