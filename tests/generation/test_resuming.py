"""Runs that are killed, stopped, resumed or shared out as shards write the same file."""

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

from megatron_longpo.errors import StopRequested, UserError
from megatron_longpo.generation import generate
from megatron_longpo.generation.shards.locks import hold
from megatron_longpo.runtime import stop
from tests.generation.scripted import Install, by_length, settings, whole_file


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
