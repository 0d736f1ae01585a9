"""When a run over many documents is given up, since one after the other fails."""

from __future__ import annotations

from megatron_longpo.errors import UserError

MOST_IN_A_ROW = 20
"""Documents that may fail one after the other, at least, before the run is given up."""

GO_ON = "what is finished is kept, and the same command goes on"


class FailuresInARow:
    """Counts failures since the last success."""

    def __init__(self, documents_at_once: int) -> None:
        """Of documents under way at the same time, all may fail twice."""
        self._most = max(MOST_IN_A_ROW, 2 * documents_at_once)
        self._number = 0

    def succeeded(self) -> None:
        self._number = 0

    def failed(self, source: str, reason: str) -> None:
        """Raises `UserError` where it was one failure too many."""
        self._number += 1
        if self._number >= self._most:
            raise UserError(
                f"{self._number} documents in a row failed, the last ({source}) with: {reason}; "
                f"{GO_ON}"
            )
