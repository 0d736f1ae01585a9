"""A lock that lets one process write, and ends with that process."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_longpo.data.jsonl import disk_errors
from megatron_longpo.errors import UserError


@contextmanager
def hold(path: Path, *, what: str, wait: bool = False) -> Iterator[None]:
    """Holds the lock file `path`, which names its holder's host and process.

    `flock`: the kernel releases it when the process ends, also by SIGKILL. NFS passes it to the
    server, so it holds between machines unless the file system is mounted with `nolock` or
    `local_lock`.

    Args:
        path: made if missing; not removed.
        what: what is locked, for the message.
        wait: wait for another holder rather than raise `UserError`.
    """
    descriptor = _locked(path, what, wait)
    try:
        with disk_errors(path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def _locked(path: Path, what: str, wait: bool) -> int:
    while True:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
            os.close(descriptor)
            raise UserError(
                f"{what} is being written by {holder or 'another process'}; wait for it or end it"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise UserError(
                f"{path}: cannot be locked ({error.strerror or error}); choose an output on a file "
                "system with locks"
            ) from error
        # Another process may have removed the folder between the two calls.
        try:
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)
