"""Starts ranks of a script on this machine, so that a hang fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]


def torchrun(
    script: str, *arguments: str, ranks: int, timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    """Runs `script`, a path from the root, on `ranks` gloo processes of one thread each."""
    command = [
        *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), str(ROOT / script), *arguments),
    ]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=rank_environment(),
        timeout=timeout_s,
        check=False,
    )


def assert_end(processes: Sequence[psutil.Process], *, timeout_s: float) -> None:
    """Waits for processes that another process has started."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    # Whoever takes in orphans may not ask for their exit codes.
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def rank_environment() -> dict[str, str]:
    """This environment, with our packages and tests on the path and one thread a process."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
