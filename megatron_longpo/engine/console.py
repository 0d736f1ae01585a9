"""Progress bars in a terminal and plain lines in a log, for the person who watches a run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from megatron_longpo.engine.metric_names import loss_parts

SHOWN_BEHIND = {
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "grad_norm": "grad norm",
    "learning_rate": "lr",
    "tokens_per_second": "tokens/s",
}
"""Metrics that follow the loss and its parts in a line, with the words that it uses."""

SUITE_KEYS = ("eval/retrieval/", "eval/ends/", "eval/nll/", "eval/retention/")
"""Prefixes of the numbers that the section `evaluation` adds to a line."""


class RunConsole:
    """Prints on the main rank; the other ranks print nothing."""

    def __init__(self, *, is_main: bool) -> None:
        self._console = Console(quiet=not is_main, highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not (is_main and self._console.is_terminal),
        )
        quiet_libraries()

    def say(self, text: str) -> None:
        """Prints one line."""
        self._console.print(text, markup=False)

    def track(self, items: Iterable[Any], *, what: str, total: int, done: int = 0) -> Iterator[Any]:
        """Yields `items` under a progress bar if the output is a terminal.

        Bars may be nested: evaluation shows its own inside training's.
        """
        is_outermost = not self._progress.tasks
        task = self._progress.add_task(what, total=total, completed=done)
        if is_outermost:
            self._progress.start()
        try:
            for item in items:
                yield item
                self._progress.advance(task)
        finally:
            self._progress.remove_task(task)
            if is_outermost:
                self._progress.stop()

    def say_step(self, metrics: Mapping[str, Any], *, num_steps: int) -> None:
        """Prints the line of an optimizer step."""
        numbers = "  ".join(f"{word} {value:.4g}" for word, value in _shown(metrics))
        self.say(f"step {metrics['step']}/{num_steps}  {numbers}")

    def say_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Prints the line of an evaluation."""
        scored = {
            key.removeprefix("eval/"): value
            for key, value in metrics.items()
            if key.startswith("eval/")
        }
        numbers = "  ".join(f"{word} {value:.6g}" for word, value in _shown(scored))
        measured = "  ".join(
            f"{key.removeprefix('eval/')} {value:.4g}"
            for key, value in metrics.items()
            # Numbers of a single kind of retrieval are a level deeper, and only in the files.
            if key.startswith(SUITE_KEYS) and key.count("/") == 2 and value is not None
        )
        numbers = "  ".join(filter(None, [numbers, measured]))
        self.say(f"evaluation at step {metrics['step']}  {numbers}")


def _shown(metrics: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Returns the words and values of a line: the loss, its parts, and the rest of `SHOWN_BEHIND`.

    A part of the loss is whatever the objective gives under a name that ends in `_loss`.
    """
    parts = {key: key.removesuffix("_loss").replace("_", " ") for key in loss_parts(metrics)}
    words = {"loss": "loss", **parts, **SHOWN_BEHIND}
    return [(word, metrics[key]) for key, word in words.items() if metrics.get(key) is not None]


def quiet_libraries() -> None:
    """Hides start-up warnings of Megatron and torch that no user can act on."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", module=r"torch\..*")
    # The same warnings, raised through our CPU shim.
    warnings.filterwarnings("ignore", module=r"megatron_longpo\.parallel\.cpu")
