"""Interrupted, sharded, contended: whatever happens, the final file is the same, or one line says
why there is none."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_longpo.data.text.examples import ExampleFile
from megatron_longpo.errors import StopRequested, UserError
from megatron_longpo.generation import generate
from megatron_longpo.generation.backends.base import BackendError
from megatron_longpo.generation.shards import failures
from megatron_longpo.generation.shards.files import Record, ShardWriter
from megatron_longpo.runtime import stop
from tests.generation.scripted import Install, by_length, settings, whole_file

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
    assert "the same command resumes" in errors.splitlines()[-1]
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
            UserError, match=r"1 documents were put aside \(1 x HTTP 500\); the same command tries"
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


def test_time_is_counted_over_runs_that_were_interrupted(
    many_documents: str, tmp_path: Path, scripted: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 0.0

    def takes_a_second(prompt: str) -> str:
        nonlocal seconds
        if seconds == 12:
            raise KeyboardInterrupt
        seconds += 1
        return by_length(prompt)

    monkeypatch.setattr(generate, "time", SimpleNamespace(monotonic=lambda: seconds))
    scripted(takes_a_second)
    config = settings("m", many_documents, tmp_path)
    with pytest.raises(StopRequested):
        generate.run_generate(config)
    merged = generate.run_generate(settings("m", many_documents, tmp_path, merge=True))
    assert (merged.num_examples, merged.seconds) == (3, 12)
    seconds = 100
    assert generate.run_generate(config).seconds == 12 + 4 * 4


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
    monkeypatch.setattr(failures, "MOST_IN_A_ROW", 3)
    backend = scripted(lambda _: BackendError("HTTP 401"))
    with pytest.raises(UserError, match=r"3 documents in a row failed, .* with: HTTP 401"):
        generate.run_generate(settings("m", many_documents, tmp_path))
    assert len(backend.batches) == 3


def test_the_final_file_reads_as_examples(
    many_documents: str, tmp_path: Path, scripted: Install
) -> None:
    scripted(by_length)
    generate.run_generate(settings("m", many_documents, tmp_path, report=True))
    assert "7 examples with 14 turns" in (tmp_path / "examples.report.html").read_text()
    examples = list(ExampleFile(tmp_path / "examples.jsonl"))
    sources = [Path(example.meta["source"]).name for example in examples]
    assert sources == [f"{number}.txt" for number in (0, 1, 3, 4, 6, 7, 8)]
