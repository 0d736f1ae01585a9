"""Whether this process was asked to save and stop, as schedulers do before a job's time is up."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_was_requested = False


def listen() -> None:
    """From now on a stop signal is remembered instead of ending the process."""
    for number in STOP_SIGNALS:
        signal.signal(number, _remember)


def was_requested() -> bool:
    """Whether a stop signal came since `listen`."""
    return _was_requested


def _remember(number: int, frame: FrameType | None) -> None:
    global _was_requested
    _was_requested = True
