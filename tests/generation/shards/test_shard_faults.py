"""Full disks, two writers, something else than before: one line, and what is finished stays."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_longpo.errors import UserError
from megatron_longpo.generation import generate
from megatron_longpo.generation.shards import files as shards
from megatron_longpo.generation.shards.files import Shard, ShardWriter, parse_shard
from megatron_longpo.generation.shards.locks import hold
from tests.generation.scripted import Install, by_length, settings, whole_file

# ---------------------------------------------------------------- full disks


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
from megatron_longpo.generation.shards import Record, ShardWriter
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


def test_a_disk_too_full_to_merge_keeps_the_shards(
    many_documents: str, tmp_path: Path, scripted: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = whole_file(many_documents, tmp_path, scripted)
    config = settings("m", many_documents, tmp_path)
    scripted(by_length)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("replace", "fsync"):
        monkeypatch.setattr(os, name, full)
        with pytest.raises(UserError, match=r"No space left on device"):
            generate.run_generate(config)
        monkeypatch.undo()
        assert not (tmp_path / "examples.jsonl").exists()
        scripted(by_length)
    backend = scripted(by_length)
    assert generate.run_generate(config).num_resumed == 9
    assert backend.prompts == []
    assert (tmp_path / "examples.jsonl").read_bytes() == whole


# ---------------------------------------------------------------- who may write


HOLDER = """
import sys
import time
from pathlib import Path
from megatron_longpo.generation.locks import hold
with hold(Path(sys.argv[1]), what="it"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_writers_on_one_shard(many_documents: str, tmp_path: Path, scripted: Install) -> None:
    lock = tmp_path / "examples.jsonl.partial" / "shard-1-of-2.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    scripted(by_length)
    config = settings("m", many_documents, tmp_path, shard="1/2")
    with pytest.raises(
        UserError,
        match=rf"shard 1/2 of .* is being written by process {holder.pid} on \S+; wait for it",
    ):
        generate.run_generate(config)
    # Nor may the folder be cleared under it.
    with pytest.raises(UserError, match=rf"is being written by process {holder.pid}"):
        generate.run_generate(settings("m", many_documents, tmp_path, overwrite=True))
    generate.run_generate(settings("m", many_documents, tmp_path, shard="0/2"))
    holder.kill()  # a lock ends with its process, however that ends
    holder.wait()
    assert generate.run_generate(config).num_examples == 7


def test_a_lock_whose_folder_was_removed_meanwhile(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with hold(folder / "a.lock", what="a"):
        shutil.rmtree(folder)
        with hold(folder / "a.lock", what="a"):
            assert (folder / "a.lock").exists()


def test_resuming_with_something_else_is_refused(
    model: str, many_documents: str, tmp_path: Path, scripted: Install
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    scripted(by_length)
    config = settings(str(copy), many_documents, tmp_path, shard="0/2")
    generate.run_generate(config)
    for key, value, message in (
        ("seed", 43, r"was made with other settings: seed was 42, now 43; give --overw"),
        ("shard", "0/3", r"was begun with 2 shards, now 3; give --shard i/2"),
    ):
        before = getattr(config, key)
        setattr(config, key, value)
        with pytest.raises(UserError, match=message):
            generate.run_generate(config)
        setattr(config, key, before)
    config.instructions = str(tmp_path / "questions.txt")
    Path(config.instructions).write_text("What?\n")
    with pytest.raises(UserError, match=r"instructions was template, now .*questions.txt \w{12};"):
        generate.run_generate(config)
    config.instructions = "template"
    config.num_threads = 2
    assert generate.run_generate(config).num_resumed == 5
    first = Path(many_documents, "0.txt")
    text = first.read_text()
    first.write_text(text + "More.")
    with pytest.raises(UserError, match=r"0.txt is number 0 now, and was another when"):
        generate.run_generate(config)
    first.write_text(text)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"was begun with another model in model \("):
        generate.run_generate(config)
    config.shard, config.overwrite = None, True
    assert generate.run_generate(config).num_resumed == 0


def test_documents_may_be_added_at_the_end(
    many_documents: str, tmp_path: Path, scripted: Install
) -> None:
    whole = whole_file(many_documents, tmp_path, scripted)
    scripted(by_length)
    for shard, limit, is_last in (("0/2", 4, False), ("1/2", None, False), ("0/2", None, True)):
        generate.run_generate(settings("m", many_documents, tmp_path, shard=shard, limit=limit))
        assert (tmp_path / "examples.jsonl").exists() == is_last
    assert (tmp_path / "examples.jsonl").read_bytes() == whole


def test_nothing_finished_leaves_nothing_behind(
    many_documents: str, tmp_path: Path, scripted: Install
) -> None:
    def lost(_: str) -> str:
        raise UserError("no server")

    scripted(lost)
    with pytest.raises(UserError, match="no server"):
        generate.run_generate(settings("m", many_documents, tmp_path))
    assert not (tmp_path / "examples.jsonl.partial").exists()
    # But never what another shard's process has begun.
    with pytest.raises(UserError, match="no server"):
        generate.run_generate(settings("m", many_documents, tmp_path, shard="0/2"))
    with hold(tmp_path / "examples.jsonl.partial" / "shard-1-of-2.lock", what="x"):
        with pytest.raises(UserError, match="no server"):
            generate.run_generate(settings("m", many_documents, tmp_path, shard="0/2"))
        assert (tmp_path / "examples.jsonl.partial" / "shard-1-of-2.lock").exists()


def test_an_old_partial_file_is_in_the_way(
    many_documents: str, tmp_path: Path, scripted: Install
) -> None:
    (tmp_path / "examples.jsonl.partial").write_text("{}\n")
    with pytest.raises(UserError, match=r"examples.jsonl.partial is in the way; remove it"):
        generate.run_generate(settings("m", many_documents, tmp_path))


def test_a_shard_is_read_from_its_text() -> None:
    assert parse_shard(None) == Shard(index=0, count=1)
    assert parse_shard("7/8") == Shard(index=7, count=8)
