"""`longpo train --nproc`: real torchrun workers, with a small script in place of training."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_longpo.runtime.launch import _exit_code

ROOT = Path(__file__).parents[2]

LAUNCHER = """
import sys
from torch.distributed import run
from megatron_longpo.runtime.launch import Launch, run_torchrun

def with_worker(arguments, parse=run.parse_args):
    module = arguments.index("-m")
    assert arguments[module + 1 : module + 3] == ["megatron_longpo", "train"]
    return parse([*arguments[:module], sys.argv[1], *arguments[module + 3 :]])

run.parse_args = with_worker
sys.exit(run_torchrun(Launch(num_processes=2), "train", sys.argv[2:]))
"""

WORKER = """
import os, pathlib, signal, sys, time
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
rank = os.environ["RANK"]
assert os.environ["WORLD_SIZE"] == "2"
pathlib.Path(__file__).with_name(f"up{rank}").touch()
mode = sys.argv[1]
if mode == "code" and rank == "1":
    sys.exit(int(sys.argv[2]))
if mode == "signal":
    while not asked:
        time.sleep(0.05)
    sys.exit(75)
if mode == "code":
    time.sleep(60)  # the launcher ends it
"""


@pytest.fixture
def launch(tmp_path: Path) -> list[str]:
    (tmp_path / "worker.py").write_text(WORKER)
    runner = tmp_path / "runner.py"
    runner.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{LAUNCHER}")
    return [sys.executable, str(runner), str(tmp_path / "worker.py")]


@pytest.mark.parametrize(("code", "said"), [(0, ""), (2, ""), (75, ""), (3, "exit code 3")])
def test_the_code_of_the_first_worker_to_fail_comes_through(
    launch: list[str], code: int, said: str
) -> None:
    mode = ["code", str(code)] if code else ["ok"]
    done = subprocess.run([*launch, *mode], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert bool(done.stderr) == bool(said), done.stderr


def test_a_signal_reaches_the_workers_which_decide(launch: list[str], tmp_path: Path) -> None:
    with subprocess.Popen([*launch, "signal"], stderr=subprocess.PIPE, text=True) as launcher:
        deadline = time.monotonic() + 120
        while not all((tmp_path / f"up{rank}").exists() for rank in range(2)):
            assert time.monotonic() < deadline, "the workers never started"
            time.sleep(0.1)
        launcher.send_signal(signal.SIGUSR1)
        assert launcher.wait(timeout=60) == 75


def test_a_worker_that_a_signal_ended_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(1, 4, -9) == 137
    assert capsys.readouterr().err == "longpo: process 1 of 4 was ended by SIGKILL\n"
