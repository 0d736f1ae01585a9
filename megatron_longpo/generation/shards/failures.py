"""Stops a run over many documents if one after the other fails."""

from __future__ import annotations

from megatron_longpo.errors import UserError

MOST_IN_A_ROW = 20
"""The run never stops before this many documents failed one after the other."""

RESUMES = "what is finished is kept, and the same command resumes"


class FailuresInARow:
    """Counts failures since the last success."""

    def __init__(self, documents_at_once: int) -> None:
        """Allows that all documents under way at the same time fail twice."""
        self._most = max(MOST_IN_A_ROW, 2 * documents_at_once)
        self._number = 0

    def succeeded(self) -> None:
        self._number = 0

    def failed(self, source: str, reason: str) -> None:
        """Counts a failure; raises `UserError` if it was one too many."""
        self._number += 1
        if self._number >= self._most:
            raise UserError(
                f"{self._number} documents in a row failed, the last ({source}) with: {reason}; "
                f"{RESUMES}"
            )
