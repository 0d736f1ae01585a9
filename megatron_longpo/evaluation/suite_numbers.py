"""Means over the results of lm-evaluation-harness, by suite, task, group and length.

`record["suites"][NAME]` has `settings` (on which its numbers depend), `mean` (see
`config.suites.HarnessSuite`) and `cells`: task, group, length (null for tasks without lengths),
metric, value, stderr, samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Cell = dict[str, Any]

MANY_TASKS = 30
"""Of a suite with more tasks, only groups are shown; its tasks are in the record."""


def suite_numbers(suites: dict[str, Any]) -> dict[str, float]:
    """Returns means by key: `suite/NAME`, `suite/NAME/LENGTH`, `suite/NAME/GROUP`,
    `suite/NAME/TASK`, and `suite/NAME/TASK/LENGTH` if the task has lengths."""
    numbers: dict[str, float] = {}
    for name, suite in suites.items():
        cells: list[Cell] = suite["cells"]
        if not cells:
            continue
        mean = suite["mean"]
        prefix = f"suite/{name}"
        numbers[prefix] = _mean(cells, mean)
        numbers |= _each(cells, "length", mean, prefix)
        within = "samples" if mean == "samples" else "tasks"
        numbers |= _each(cells, "group", within, prefix)
        tasks = list(dict.fromkeys(cell["task"] for cell in cells))
        if len(tasks) > MANY_TASKS or tasks == [name]:
            continue
        for task in tasks:
            of_task = [cell for cell in cells if cell["task"] == task]
            inside = f"{prefix}/{task.removeprefix(f'{name}_')}"
            numbers[inside] = _mean(of_task, "tasks")
            numbers |= _each(of_task, "length", "tasks", inside)
    return numbers


def _each(cells: Sequence[Cell], key: str, mean: str, prefix: str) -> dict[str, float]:
    values = dict.fromkeys(cell[key] for cell in cells if cell[key] is not None)
    ordered = sorted(values) if key == "length" else list(values)
    return {
        f"{prefix}/{value}": _mean([cell for cell in cells if cell[key] == value], mean)
        for value in ordered
    }


def _mean(cells: Sequence[Cell], mean: str) -> float:
    if mean == "groups":
        groups = dict.fromkeys(cell["group"] for cell in cells)
        parts = [[cell for cell in cells if cell["group"] == group] for group in groups]
        return sum(_mean(part, "tasks") for part in parts) / len(parts)
    weights = [cell["samples"] if mean == "samples" else 1 for cell in cells]
    total = sum(cell["value"] * weight for cell, weight in zip(cells, weights, strict=True))
    return float(total / sum(weights))
