"""Interrupted, sharded, contended: whatever happens, the final file is the same, or one line says
why there is none."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_longpo import stop
from megatron_longpo.data.examples import ExampleFile
from megatron_longpo.errors import StopRequested, UserError
from megatron_longpo.generation import generate, shards
from megatron_longpo.generation.backends.base import BackendError
from megatron_longpo.generation.locks import hold
from megatron_longpo.generation.shards import Record, Shard, ShardWriter, parse_shard
from tests.generation.scripted import DOCUMENT, Scripted, by_length, settings

Install = Callable[..., Scripted]


@pytest.fixture
def many_documents(tmp_path: Path) -> str:
    """Nine documents, of which the third and the sixth give no example."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(9):
        text = DOCUMENT.replace("Thing", f"Thing{number}x")
        (folder / f"{number}.txt").write_text("Too short." * number if number in (2, 5) else text)
    (folder / "binary.txt").write_bytes(b"\0")
    return str(folder)


def whole_file(documents: str, tmp_path: Path, scripted: Install) -> bytes:
    """The examples file of one uninterrupted process."""
    scripted(by_length)
    config = settings("m", documents, tmp_path, output=str(tmp_path / "whole.jsonl"))
    generate.run_generate(config)
    return (tmp_path / "whole.jsonl").read_bytes()


# ---------------------------------------------------------------- the same file, however it comes


@pytest.mark.parametrize("num_shards", [1, 2, 4])
@pytest.mark.parametrize("documents_at_once", [1, 3])
def test_shards_and_documents_at_once_change_nothing(
    many_documents: str,
    tmp_path: Path,
    scripted: Install,
    num_shards: int,
    documents_at_once: int,
) -> None:
    whole = whole_file(many_documents, tmp_path, scripted)
    backend = scripted(by_length, documents_at_once=documents_at_once)
    for index in reversed(range(num_shards)):
        config = settings("m", many_documents, tmp_path, shard=f"{index}/{num_shards}")
        assert not (tmp_path / "examples.jsonl").exists()
        summary = generate.run_generate(config)
    assert (tmp_path / "examples.jsonl").read_bytes() == whole
    assert not (tmp_path / "examples.jsonl.partial").exists()
    assert backend.most_under_way == min(documents_at_once, -(-9 // num_shards))
    assert (summary.num_documents, summary.num_examples) == (10, 7)
    assert summary.dropped == {
        "document without a chunk of the right length": 2,
        "binary file": 1,
    }
    written = json.loads((tmp_path / "examples.summary.json").read_text())
    assert (written["num_turns"], written["dropped"]["binary file"]) == (14, 1)


def test_a_run_cut_anywhere_goes_on_to_the_same_file(
    many_documents: str, tmp_path: Path, scripted: Install
) -> None:
    whole = whole_file(many_documents, tmp_path, scripted)
    config = settings("m", many_documents, tmp_path, report=False)
    partial = tmp_path / "examples.jsonl.partial"
    shard = partial / "shard-0-of-1.jsonl"
    rng = random.Random(0)
    calls = 0

    def interrupted(prompt: str) -> str:
        nonlocal calls
        calls += 1
        if calls == 13:
            raise KeyboardInterrupt
        return by_length(prompt)

    scripted(interrupted)
    with pytest.raises(StopRequested, match=r"interrupted; what is finished is kept"):
        generate.run_generate(config)
    data = shard.read_bytes()
    ends = [index + 1 for index, byte in enumerate(data) if byte == 10]
    assert len(ends) == 4  # three examples and a drop
    for cut in [0, *ends, *(rng.randrange(len(data)) for _ in range(8))]:
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        shutil.copytree(partial, tmp_path / "cut" / "examples.jsonl.partial")
        os.truncate(tmp_path / "cut" / "examples.jsonl.partial" / shard.name, cut)
        config.output = str(tmp_path / "cut" / "examples.jsonl")
        backend = scripted(by_length)
        summary = generate.run_generate(config)
        finished = sum(end <= cut for end in ends)
        assert summary.num_resumed == finished
        # Nothing finished is asked again, drops neither.
        assert len(backend.prompts) == 4 * (7 - min(finished, 2) - (finished == 4))
        assert Path(config.output).read_bytes() == whole


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


# ---------------------------------------------------------------- stopping


def test_a_stop_signal_finishes_what_is_under_way(
    many_documents: str, tmp_path: Path, scripted: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = whole_file(many_documents, tmp_path, scripted)

    def answer(prompt: str) -> str:
        monkeypatch.setattr(stop, "_was_requested", True)
        return by_length(prompt)

    scripted(answer, documents_at_once=2)
    config = settings("m", many_documents, tmp_path)
    with pytest.raises(StopRequested, match=r"stopped on request; what is finished is kept"):
        generate.run_generate(config)
    monkeypatch.setattr(stop, "_was_requested", False)
    scripted(by_length)
    assert generate.run_generate(config).num_resumed == 2
    assert (tmp_path / "examples.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_command_with_75(
    model: str, many_documents: str, tmp_path: Path, number: signal.Signals
) -> None:
    command = [
        *(sys.executable, "-m", "megatron_longpo", "generate", "--model", model),
        *("--documents", many_documents, "--output", str(tmp_path / "examples.jsonl")),
        *("--instructions", "template", "--chunk_min_tokens", "60", "--chunk_max_tokens", "150"),
        *("--max_new_tokens", "100", "--num_threads", "1"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    shard = tmp_path / "examples.jsonl.partial" / "shard-0-of-1.jsonl"
    while process.poll() is None and not (shard.exists() and shard.stat().st_size):
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert errors.splitlines()[-1].startswith("longpo: ")
    assert "the same command goes on" in errors.splitlines()[-1]
    assert shard.read_bytes().endswith(b"\n")


# ---------------------------------------------------------------- backends that fail


def test_documents_that_a_backend_fails_on_are_tried_again(
    many_documents: str, tmp_path: Path, scripted: Install
) -> None:
    whole = whole_file(many_documents, tmp_path, scripted)

    def failing(prompt: str) -> str | BackendError:
        return BackendError("HTTP 500") if "Thing4x" in prompt else by_length(prompt)

    scripted(failing, documents_at_once=2)
    config = settings("m", many_documents, tmp_path)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"1 documents were put aside \(1 HTTP 500\); the same command tries"
        ):
            generate.run_generate(config)
        assert not (tmp_path / "examples.jsonl").exists()
    backend = scripted(by_length)
    summary = generate.run_generate(config)
    assert (summary.num_resumed, len(backend.prompts)) == (8, 4)
    assert not summary.put_aside
    assert (tmp_path / "examples.jsonl").read_bytes() == whole


def test_merging_without_what_is_unfinished(
    many_documents: str, tmp_path: Path, scripted: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = whole_file(many_documents, tmp_path, scripted)
    config = settings("m", many_documents, tmp_path, merge=True)
    with pytest.raises(UserError, match=r"merge \(true\): there is no .*partial"):
        generate.run_generate(config)
    scripted(by_length)
    generate.run_generate(settings("m", many_documents, tmp_path, shard="1/2"))
    assert generate.run_generate(config).num_examples == 3
    assert "shard 0/2 has not ended" in capsys.readouterr().err
    second, third = (tmp_path / "examples.jsonl").read_bytes().splitlines()[1:]
    assert whole.splitlines()[1:].index(second) < whole.splitlines()[1:].index(third)
    generate.run_generate(settings("m", many_documents, tmp_path, shard="0/2"))
    assert (tmp_path / "examples.jsonl").read_bytes() == whole
    assert not (tmp_path / "examples.jsonl.partial").exists()


def test_a_lost_server_keeps_what_is_finished(
    many_documents: str, tmp_path: Path, scripted: Install
) -> None:
    def lost(prompt: str) -> str:
        if "Thing4x" in prompt:
            raise UserError("server.endpoints (http://a): cannot be reached")
        return by_length(prompt)

    scripted(lost, documents_at_once=2)
    config = settings("m", many_documents, tmp_path)
    with pytest.raises(UserError, match=r"cannot be reached"):
        generate.run_generate(config)
    scripted(by_length)
    assert generate.run_generate(config).num_resumed >= 3


def test_a_backend_that_fails_on_everything_is_given_up(
    many_documents: str, tmp_path: Path, scripted: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "FAILURES_IN_A_ROW", 3)
    backend = scripted(lambda _: BackendError("HTTP 401"))
    with pytest.raises(UserError, match=r"3 documents in a row failed, .* with: HTTP 401"):
        generate.run_generate(settings("m", many_documents, tmp_path))
    assert len(backend.batches) == 3


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
        ("overwrite", True, r"overwrite \(true\): would remove what other shards write"),
    ):
        before = getattr(config, key)
        setattr(config, key, value)
        with pytest.raises(UserError, match=message):
            generate.run_generate(config)
        setattr(config, key, before)
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8/8", r"shard \(8/8\): i counts from 0, so n shards are 0/n to n-1/n; .*--array=0-7"),
        ("0/0", r"shard \(0/0\): i counts from 0"),
        ("1", r"shard \(1\): must be i/n, such as 0/8"),
        ("-1/4", r"shard \(-1/4\): must be i/n"),
    ],
)
def test_bad_shards_are_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_shard(text)
    assert parse_shard(None) == Shard(index=0, count=1)
    assert parse_shard("7/8") == Shard(index=7, count=8)


def test_the_final_file_reads_as_examples(
    many_documents: str, tmp_path: Path, scripted: Install
) -> None:
    scripted(by_length)
    generate.run_generate(settings("m", many_documents, tmp_path, report=True))
    assert "7 examples with 14 turns" in (tmp_path / "examples.report.html").read_text()
    examples = list(ExampleFile(tmp_path / "examples.jsonl"))
    sources = [Path(example.meta["source"]).name for example in examples]
    assert sources == [f"{number}.txt" for number in (0, 1, 3, 4, 6, 7, 8)]
