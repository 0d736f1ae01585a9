"""What a process gets when the one that started it ends, however that ends.

Linux's prctl alone; it goes by the thread that did the starting, which is the main one in torchrun
and in training.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def is_torchrun() -> bool:
    """Whether this process is one of torchrun's, or of `--nproc`."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def when_it_ends(number: signal.Signals, *, parent: int | None = None) -> None:
    """From now on that signal comes then; `parent`, where given, is who must still be there."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if parent is not None and os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), number)
