"""Progress of generation, its rates and its end: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self

LOG_SECONDS = 30.0
"""Between two lines, if there is no terminal."""


class GenerateProgress:
    """Counts finished documents; rates and the end follow from what this run has done."""

    def __init__(self, *, description: str, total: int | None) -> None:
        self._description = description
        self._total = total
        """Documents of this run's shard; None if unknown."""
        self._done = self._done_before = self._turns = self._tokens = 0
        self._started = self._logged = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        console = Console(stderr=True)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rates]}"),
                console=console,
            )
            self._task = self._bar.add_task(self._description, total=self._total, rates="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def resumed(self) -> None:
        """Counts a document that an earlier run finished."""
        self._done_before += 1

    def finished(self, *, num_turns: int, num_tokens: int) -> None:
        """Counts a document of this run, its turns, and all tokens that were written for it."""
        self._done += 1
        self._turns += num_turns
        self._tokens += num_tokens
        if self._bar is not None:
            self._bar.update(
                self._task, completed=self._done + self._done_before, rates=self.rates()
            )
        elif time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            number = f"{self._done + self._done_before}"
            if self._total is not None:
                number += f"/{self._total}"
            print(
                f"{self._description}: {number} documents, {self.rates()}",
                file=sys.stderr,
                flush=True,
            )

    def rates(self) -> str:
        """Returns the rates as text.

        `12.0 documents and 40.1 turns a minute, 310 tokens/s, ends in 1:02:03 (at 21:40)`
        """
        seconds = max(time.monotonic() - self._started, 1e-3)
        text = (
            f"{60 * self._done / seconds:.1f} documents and {60 * self._turns / seconds:.1f} turns "
            f"a minute, {self._tokens / seconds:.0f} tokens/s"
        )
        if self._total is not None and self._done:
            left = max(0, self._total - self._done - self._done_before)
            rest = timedelta(seconds=round(seconds * left / self._done))
            text += f", ends in {rest} (at {datetime.now() + rest:%a %H:%M})"
        return text
