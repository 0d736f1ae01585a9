"""Several servers of the same model: chooses the next to ask, and stops the run if all are lost."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_longpo.errors import UserError

FIRST_WAIT = 1.0
"""Seconds before a request is sent again for the first time; each further wait is twice as long."""

LONGEST_WAIT = 60.0


def backoff(num_failures: int) -> float:
    """Returns seconds to wait after a number of failures in a row, scattered by a half each way."""
    wait = min(FIRST_WAIT * 2 ** (num_failures - 1), LONGEST_WAIT)
    return wait * random.uniform(0.5, 1.5)


@dataclass(kw_only=True)
class Endpoint:
    """One URL of a server."""

    url: str
    client: Any
    """`openai.AsyncOpenAI`."""
    num_waiting: int = 0
    """Requests under way there."""
    num_unreachable: int = 0
    """Failures to reach it in a row."""
    ready_at: float = 0.0
    """Earliest `time.monotonic()` at which it may be asked."""

    def answered(self) -> None:
        self.num_unreachable = 0

    def unreachable(self) -> None:
        """Pauses the endpoint; requests that fail together count once."""
        if self.ready_at <= time.monotonic():
            self.num_unreachable += 1
            self.pause(backoff(self.num_unreachable))

    def pause(self, seconds: float) -> None:
        self.ready_at = max(self.ready_at, time.monotonic() + seconds)


class EndpointPool:
    """Gives the endpoint with the fewest requests; stops the run if none answers for too long."""

    def __init__(self, endpoints: Sequence[Endpoint], *, outage_seconds: float) -> None:
        self.endpoints = list(endpoints)
        self._outage_seconds = outage_seconds
        self._held_up_since: float | None = None

    async def next(self) -> Endpoint:
        """Returns the endpoint with the fewest requests that may be asked now; waits for one."""
        while True:
            now = time.monotonic()
            ready = [endpoint for endpoint in self.endpoints if endpoint.ready_at <= now]
            if ready:
                return min(ready, key=lambda endpoint: endpoint.num_waiting)
            await asyncio.sleep(min(endpoint.ready_at for endpoint in self.endpoints) - now)

    def got_answer(self) -> None:
        self._held_up_since = None

    def held_up(self, reason: str) -> None:
        """Notes that an endpoint could not serve a request now.

        Raises:
            UserError: no request was answered or under way for longer than the outage allowed.
        """
        now = time.monotonic()
        if self._held_up_since is None:
            self._held_up_since = now
        waited = now - self._held_up_since
        # An endpoint that is at work may take longer over one answer than an outage may last.
        at_work = any(endpoint.num_waiting for endpoint in self.endpoints)
        if waited >= self._outage_seconds and not at_work:
            urls = ", ".join(endpoint.url for endpoint in self.endpoints)
            raise UserError(
                f"server ({urls}): no answer for {waited / 60:.1f} minutes ({reason}); finished "
                "samples are kept, and the same command resumes once the server is back"
            )
