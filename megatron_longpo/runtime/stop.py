"""Whether this process was asked to save and stop, as schedulers do before a job's time is up."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

from megatron_longpo.runtime import parent

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_was_requested = False


def listen() -> None:
    """From now on a stop signal is remembered instead of ending the process."""
    for number in STOP_SIGNALS:
        signal.signal(number, _remember)


def was_requested() -> bool:
    """Whether a stop signal came since `listen`."""
    return _was_requested


@contextmanager
def spare_children() -> Iterator[None]:
    """Processes that are started inside are not ended by a stop signal; forked ones end with this.

    Launchers send it to all processes of a job, and those that write a checkpoint are needed. Here
    a signal that comes meanwhile is remembered at the end. Without this process they would keep its
    GPU memory, and write into the folder of the run that takes over.
    """
    # Where it starts, Python lets these signals through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        with parent.ending_children():
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _remember(number: int, frame: FrameType | None) -> None:
    global _was_requested
    _was_requested = True
