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
    UserError,
)
from megatron_longpo.runtime.parent import LAUNCHER_PID

EXPLAINED_CODES = (EXIT_BAD_INPUT, EXIT_STOPPED_ON_REQUEST, EXIT_INTERRUPTED)
"""Exit codes for which the worker itself has printed the reason."""

FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that are passed on to the workers, which save and stop, or stop."""


LAUNCH_HELP = (
    ("--nproc M", "Start M processes on this machine, one per GPU."),
    (
        "--nnodes N",
        "Number of nodes. All run this command, with the same next two options.",
    ),
    ("--rdzv_endpoint HOST:PORT", "Where the nodes meet: a free port of one of them."),
    ("--rdzv_id ID", "Name that tells this run from others at that endpoint; default longpo."),
)
"""Options of the commands that launch, with their meaning. They are no keys of the YAML."""
LAUNCH_OPTIONS = tuple(option.split()[0] for option, _ in LAUNCH_HELP)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """How many workers to start on this node, and how the nodes of the run meet."""

    num_processes: int
    """Workers on this node."""
    num_nodes: int = 1
    rdzv_endpoint: str | None = None
    """`HOST:PORT` where the nodes meet; None on one node."""
    rdzv_id: str = "longpo"

    @property
    def torchrun_options(self) -> list[str]:
        """The same as options of torchrun."""
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


def take_launch(arguments: Sequence[str]) -> tuple[Launch | None, list[str]]:
    """Splits a command line into the launcher's options, None if there are none, and the rest."""
    rest: list[str] = []
    found: dict[str, str] = {}
    tokens = iter(arguments)
    for token in tokens:
        option, _, value = token.partition("=")
        if option in LAUNCH_OPTIONS:
            found[option] = value or next(tokens, "")
        else:
            rest.append(token)
    if not found:
        return None, rest
    for option in ("--nproc", "--nnodes"):
        value = found.get(option, "1")
        if not value.isdecimal() or int(value) < 1:
            raise UserError(f"{option} ({value}) must be an integer, at least 1")
    if "WORLD_SIZE" in os.environ:
        option, value = next(iter(found.items()))
        raise UserError(
            f"{option} ({value}): a launcher has started this process already. Leave {option} out"
        )
    num_nodes = int(found.get("--nnodes", "1"))
    if num_nodes > 1 and not found.get("--rdzv_endpoint"):
        raise UserError(
            f"--nnodes ({num_nodes}) needs --rdzv_endpoint HOST:PORT, the same on every node: the "
            "first node's name and a free port there"
        )
    launch = Launch(
        num_processes=int(found.get("--nproc", "1")),
        num_nodes=num_nodes,
        rdzv_endpoint=found.get("--rdzv_endpoint"),
        rdzv_id=found.get("--rdzv_id", "longpo"),
    )
    return launch, rest


def run_torchrun(launch: Launch, command: str, arguments: Sequence[str]) -> int:
    """Runs a command in this node's workers and returns the exit code of the first to fail.

    It does the same as `torchrun ... -m megatron_longpo COMMAND ...`, except that torchrun turns
    every failure into exit code 1 and a traceback of its own.
    """
    num_processes = launch.num_processes
    # Before the imports, which take seconds in which a scheduler's signal would end the process.
    signal.signal(signal.SIGUSR1, _forward)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig

    # torchrun's default is one thread per worker, with a warning. Share the cores instead.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    options = launch.torchrun_options
    if any(field.name == "signals_to_handle" for field in dataclasses.fields(LaunchConfig)):
        options.append("--signals-to-handle=SIGHUP,SIGQUIT")
        for forwarded in FORWARDED_SIGNALS:
            signal.signal(forwarded, _forward)
    # torchrun's report of a failed worker repeats what the worker has printed.
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
    """Returns a worker's exit code as a shell would; a signal is a negative number here."""
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
