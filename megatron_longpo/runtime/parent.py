"""Processes that end when the process that started them ends, for whatever reason.

Linux's prctl does it: the kernel kills them when the thread that started them ends. That is the
main thread in torchrun and in training.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1
LAUNCHER_PID = "LONGPO_LAUNCHER_PID"
"""Environment variable that `--nproc` sets for its ranks."""

# Loaded here, since loading may hang in a process that was forked beside threads.
_prctl = ctypes.CDLL(None).prctl if sys.platform.startswith("linux") else None
_forking_pid: int | None = None
"""Within `ending_children`: the id of the process that forked last."""


def end_with_launcher() -> None:
    """Makes this process end with its launcher, if torchrun or `--nproc` has started it."""
    # Removed, since it is not meant for what this process starts, such as a torchrun.
    launcher = os.environ.pop(LAUNCHER_PID, None)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_parent(None if launcher is None else int(launcher))


@contextmanager
def ending_children() -> Iterator[None]:
    """Makes processes that are forked within, and those that they fork, end with their parent."""
    global _forking_pid
    before, _forking_pid = _forking_pid, os.getpid()
    try:
        yield
    finally:
        _forking_pid = before


def _end_with_parent(expected_pid: int | None) -> None:
    """Makes this process end with its parent; `expected_pid` tells if that has ended already."""
    if _prctl is None:
        return
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if expected_pid is not None and os.getppid() != expected_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def _before_fork() -> None:
    global _forking_pid
    if _forking_pid is not None:
        _forking_pid = os.getpid()


def _after_fork() -> None:
    if _forking_pid is not None:
        _end_with_parent(_forking_pid)


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
