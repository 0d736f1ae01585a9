"""The job array's script, with what Slurm sets and sends, and stand-ins for what it calls."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm" / "generate.sbatch"

LONGPO = """#!/usr/bin/env bash
echo "$@" >> {folder}/longpo.txt
trap 'sleep 0.3; exit 75' USR1
for _ in $(seq {seconds}0); do sleep 0.1; done
exit {code}
"""


def start(tmp_path: Path, *, seconds: int, code: int, **variables: str) -> subprocess.Popen[bytes]:
    scripts = {
        "longpo": LONGPO.format(folder=tmp_path, seconds=seconds, code=code),
        "scontrol": f'#!/usr/bin/env bash\necho "$@" >> {tmp_path}/scontrol.txt\n',
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_ARRAY_TASK_COUNT": "8",
        "SLURM_ARRAY_JOB_ID": "41",
        "SLURM_JOB_ID": "41",
        **variables,
    }
    return subprocess.Popen([SCRIPT, "a.yaml", "--seed", "1"], env=environment)


@pytest.mark.parametrize("code", [0, 2, 137])
def test_a_task_ends_as_its_shard_does(tmp_path: Path, code: int) -> None:
    assert start(tmp_path, seconds=0, code=code).wait(timeout=30) == code
    assert (
        tmp_path / "longpo.txt"
    ).read_text() == "generate --config a.yaml --shard 3/8 --seed 1\n"
    assert not (tmp_path / "scontrol.txt").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_task_requeues_itself_when_told_to_stop_but_not_when_cancelled(
    tmp_path: Path, number: signal.Signals
) -> None:
    task = start(tmp_path, seconds=20, code=0, LONGPO_SHARDS="16")
    while not (tmp_path / "longpo.txt").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    task.send_signal(number)
    is_requeued = number == signal.SIGUSR1
    assert task.wait(timeout=30) == (0 if is_requeued else 75)
    assert (tmp_path / "longpo.txt").read_text().split()[4] == "3/16"
    assert (tmp_path / "scontrol.txt").exists() == is_requeued
    if is_requeued:
        assert (tmp_path / "scontrol.txt").read_text() == "requeue 41_3\n"
