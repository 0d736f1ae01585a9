"""`longpo COMMAND --nproc M`: torchrun on this machine, with exit codes that reach the caller."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from megatron_longpo.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_STOPPED_ON_REQUEST,
)
from megatron_longpo.runtime.parent import LAUNCHER_PID

EXPLAINED_CODES = (EXIT_BAD_INPUT, EXIT_STOPPED_ON_REQUEST, EXIT_INTERRUPTED)
"""Exit codes whose reason the worker has printed."""

FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""A worker decides what these mean: to save and stop, or to stop."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """How many workers to start here, and who else belongs to the run."""

    num_processes: int
    """On this node."""
    num_nodes: int = 1
    rdzv_endpoint: str | None = None
    """`HOST:PORT` where the nodes meet; None on one node."""
    rdzv_id: str = "longpo"

    @property
    def torchrun_options(self) -> list[str]:
        options = [f"--nproc-per-node={self.num_processes}"]
        if self.num_nodes == 1:
            return ["--standalone", *options]
        return [
            *options,
            f"--nnodes={self.num_nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.rdzv_endpoint}",
            f"--rdzv-id={self.rdzv_id}",
        ]


def run_torchrun(launch: Launch, command: str, arguments: Sequence[str]) -> int:
    """Runs a command in this node's workers and returns the exit code of the first to fail.

    The same as `torchrun ... -m megatron_longpo COMMAND ...`, which would turn every failure into
    exit code 1 and a traceback of its own.
    """
    num_processes = launch.num_processes
    # Before the imports, which take seconds in which a scheduler's signal would end the process.
    signal.signal(signal.SIGUSR1, _forward)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig

    # One thread a worker is torchrun's default, with a warning: share the cores instead.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    options = launch.torchrun_options
    if any(field.name == "signals_to_handle" for field in dataclasses.fields(LaunchConfig)):
        options.append("--signals-to-handle=SIGHUP,SIGQUIT")
        for forwarded in FORWARDED_SIGNALS:
            signal.signal(forwarded, _forward)
    # Its report of a failed worker repeats what the worker has printed.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL + 1)
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(
        logging.CRITICAL + 1
    )
    os.environ[LAUNCHER_PID] = str(os.getpid())
    try:
        run.run(run.parse_args([*options, "-m", "megatron_longpo", command, *arguments]))
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        return _exit_code(rank, num_processes, failure.exitcode)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return EXIT_DONE


def _exit_code(rank: int, num_processes: int, code: int) -> int:
    """A worker's exit code; one that a signal ended is a negative number to its parent."""
    if code < 0:
        name = signal.Signals(-code).name
        print(f"longpo: process {rank} of {num_processes} was ended by {name}", file=sys.stderr)
        return 128 - code
    if code not in EXPLAINED_CODES:
        print(
            f"longpo: process {rank} of {num_processes} failed with exit code {code}",
            file=sys.stderr,
        )
    return code


def _forward(number: int, frame: FrameType | None) -> None:
    import psutil

    for worker in psutil.Process().children():
        worker.send_signal(number)
