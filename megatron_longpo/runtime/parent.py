"""Processes that end with the one that started them, however that one ends.

By Linux's prctl: the kernel kills them. It goes by the thread that did the starting, which is the
main one in torchrun and in training.
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
"""Set by `--nproc` for its ranks."""

# Loaded here, since loading may hang in a process that was forked beside threads.
_prctl = ctypes.CDLL(None).prctl if sys.platform.startswith("linux") else None
_forking_pid: int | None = None
"""Within `ending_children`, of the process that has forked last."""


def end_with_launcher() -> None:
    """Where this process is one of torchrun's, or of `--nproc`."""
    # Not for what this process starts, a torchrun perhaps.
    launcher = os.environ.pop(LAUNCHER_PID, None)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_parent(None if launcher is None else int(launcher))


@contextmanager
def ending_children() -> Iterator[None]:
    """Processes that are forked within, and those that they fork, end with who has forked them."""
    global _forking_pid
    before, _forking_pid = _forking_pid, os.getpid()
    try:
        yield
    finally:
        _forking_pid = before


def _end_with_parent(expected_pid: int | None) -> None:
    """`expected_pid`: of the parent, which may have ended before."""
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
