"""Generation that is killed again and again gives the file of a run that was left alone."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_longpo.data.text.examples import ExampleFile
from tests.generation.scripted import DOCUMENT

SECONDS_A_RUN = 120


def start(model: str, documents: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, "-m", "megatron_longpo", "generate", "--model", model),
        *("--documents", str(documents), "--output", str(output)),
        *("--instructions", "template", "--chunk_min_tokens", "60", "--chunk_max_tokens", "150"),
        *("--turns", "2", "--max_new_tokens", "24", "--dtype", "fp32", "--device", "cpu"),
        *("--num_threads", "1", "--report", "false", *options),
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=SECONDS_A_RUN)
    assert process.returncode == 0, errors


def kill_when_grown(process: subprocess.Popen[str], shard: Path, rng: random.Random) -> bool:
    """SIGKILL a moment after some more documents are done; whether it was still running."""
    enough = num_lines(shard) + rng.randint(0, 3)
    begun = time.monotonic()
    while process.poll() is None and (not shard.exists() or num_lines(shard) < enough):
        assert time.monotonic() - begun < SECONDS_A_RUN
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.15))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize(
    ("num_kills", "num_shards"),
    [
        (2, 1),
        pytest.param(10, 1, marks=pytest.mark.slow),
        pytest.param(10, 2, marks=pytest.mark.slow),
    ],
)
def test_killed_generation_gives_the_same_file(
    model: str, tmp_path: Path, num_kills: int, num_shards: int
) -> None:
    documents = tmp_path / "documents"
    documents.mkdir()
    num_documents = 6 * num_kills
    for number in range(num_documents):
        text = "Too short." * number if number % 7 == 3 else DOCUMENT
        (documents / f"{number:03}.txt").write_text(text.replace("Thing", f"Thing{number}x"))
    whole, output = tmp_path / "whole.jsonl", tmp_path / "examples.jsonl"
    finish(start(model, documents, whole))

    rng = random.Random(num_kills)
    kills = 0
    for index in range(num_shards):
        shard = Path(f"{output}.partial") / f"shard-{index}-of-{num_shards}.jsonl"
        while kills < num_kills * (index + 1) // num_shards:
            before = shard.read_bytes() if shard.exists() else b""
            process = start(model, documents, output, "--shard", f"{index}/{num_shards}")
            assert kill_when_grown(process, shard, rng), "it ended before it was killed"
            kills += 1
            # What was finished stays where it was: it is neither lost nor written again.
            assert shard.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
        finish(start(model, documents, output, "--shard", f"{index}/{num_shards}"))
    assert kills == num_kills
    assert output.read_bytes() == whole.read_bytes()
    ids = [example.id for example in ExampleFile(output)]
    assert len(ids) == len(set(ids)) > num_documents / 2
