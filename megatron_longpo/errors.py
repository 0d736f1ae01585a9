"""The one exception a user is meant to read, and the exit codes of every command."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_CHECK_FAILED = 1
"""A command that compares has found a difference, and has shown it."""
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_STOPPED_ON_REQUEST = 75
"""Saved and stopped because a signal asked for it; a scheduler should requeue the job."""


class UserError(ValueError):
    """Bad input or settings. The message is one line: what (key, file and line), value, remedy.

    `cli.main` prints the message on stderr and exits with `EXIT_BAD_INPUT`; nothing else does.
    """


class CheckFailed(Exception):
    """A comparison that the user asked for found a difference (exit code 1); one line says which.

    Unlike a `UserError` nobody's input is wrong: the two things compared are not the same.
    """


class StopRequested(Exception):
    """A command saved and stopped because a signal asked for it (exit code 75)."""


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Returns the candidate most like `name`, or None where nothing is close."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return matches[0] if matches else None
