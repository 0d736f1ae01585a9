"""Exceptions whose messages are for the user, and the exit codes of all commands."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_CHECK_FAILED = 1
"""A command that compares has found a difference and shown it."""
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_STOPPED_ON_REQUEST = 75
"""Saved and stopped because a signal asked for it; a scheduler should requeue the job."""


class UserError(ValueError):
    """Bad input or settings. The message is one line: what (key, file and line), value, remedy.

    `cli.main` prints the message on stderr and exits with `EXIT_BAD_INPUT`; nothing else does.
    """


class CheckFailed(Exception):
    """A comparison that the user asked for found a difference (exit code 1).

    The message is one line that names the difference. Unlike a `UserError`, no input is wrong.
    """


class StopRequested(Exception):
    """A command saved and stopped because a signal asked for it (exit code 75)."""


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Returns the candidate that is most similar to `name`, or None if none is close."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return matches[0] if matches else None
