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
    """Makes stop signals be remembered instead of ending the process."""
    for number in STOP_SIGNALS:
        signal.signal(number, _remember)


def was_requested() -> bool:
    """Returns whether a stop signal has come since `listen`."""
    return _was_requested


@contextmanager
def spare_children() -> Iterator[None]:
    """Protects processes that are started within from stop signals; forked ones end with this one.

    Launchers send stop signals to all processes of a job, but those that write a checkpoint are
    still needed. A signal that comes to this process meanwhile is remembered at the end. If forked
    processes outlived this one, they would keep its GPU memory, and write into the folder of the
    run that takes over.
    """
    # Starting it makes Python unblock these signals, so it is started before they are blocked.
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
