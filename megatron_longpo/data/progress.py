"""Progress bars, and counts of what was dropped, for commands over documents or examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], *, description: str, total: int) -> Iterator[T]:
    """Yields the items under a progress bar on stderr; no bar if stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with progress:
        yield from progress.track(items, total=total, description=description)


class Dropped(Exception):
    """Raised for an item that gives no example or row; its message is the reason, to be counted."""


def format_counts(counts: Counter[str]) -> str:
    """Returns `3 x long answer, 1 x empty answer`, the most frequent first."""
    return ", ".join(f"{number} x {reason}" for reason, number in counts.most_common())
