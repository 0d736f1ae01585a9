"""Plots of the study: found and ended by length, gained against lost, and curves over training.

Plain matplotlib without pyplot: it draws without a display and leaves no global state.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_longpo.evaluation.figures import (
    color,
    grid,
    legend_above,
    length_axis,
    look,
    save_figures,
)
from tools.studies.smollm2_32k.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Groups = Mapping[str, Sequence[Result]]
"""Results by the title of their line in the table."""

CURVE_POINTS = 16
"""Of what every step has: means over stretches of steps."""


def draw_all(groups: Groups, folder: Path) -> list[str]:
    """Draws what there are numbers for, and returns the names of the files."""
    trained = {title: found for title, found in groups.items() if found[0].curves}
    figures = {
        "retrieval.png": draw_retrieval(groups),
        "retention.png": draw_retention(groups),
        "curves.png": draw_curves(trained) if trained else None,
    }
    return save_figures(figures, folder, dpi=120)


def retrieval(result: Result) -> dict[int, float]:
    """Shares of numbers found, by length."""
    return _by_length(result, "retrieval/")


def ended(result: Result, *, longest: int) -> float | None:
    """Share of answers ended, mean over lengths up to that one; None where not measured."""
    by_length = _by_length(result, "ends/")
    values = [value for length, value in by_length.items() if length <= longest]
    return statistics.mean(values) if values else None


def _by_length(result: Result, prefix: str) -> dict[int, float]:
    found = {
        key.removeprefix(prefix): value
        for key, value in result.numbers.items()
        if key.startswith(prefix)
    }
    return {int(length): found[length] for length in sorted(found, key=len) if length.isdecimal()}


def gained(result: Result) -> float:
    """Mean retrieval at the two longest lengths."""
    return statistics.mean(list(retrieval(result).values())[-2:])


def draw_retrieval(groups: Groups) -> Figure:
    """Numbers found and answers ended: means over seeds; bars from the least to the most."""
    figure, both_axes = grid(2, width=5.6, height=4.4)
    panels = (("numbers found", "retrieval/"), ("answers ended", "ends/"))
    for axes, (what, prefix) in zip(both_axes, panels, strict=True):
        all_lengths: set[int] = set()
        for number, (title, results) in enumerate(groups.items()):
            by_length = [found for result in results if (found := _by_length(result, prefix))]
            lengths = sorted(by_length[0]) if by_length else []
            all_lengths |= set(lengths)
            values = [[found[length] for found in by_length] for length in lengths]
            means = [statistics.mean(column) for column in values]
            lows = [mean - min(column) for mean, column in zip(means, values, strict=True)]
            highs = [max(column) - mean for mean, column in zip(means, values, strict=True)]
            bars = [lows, highs]
            axes.errorbar(lengths, means, yerr=bars, capsize=3, label=title, **look(number))
        length_axis(axes, sorted(all_lengths))
        axes.set_xlabel("tokens")
        axes.set_ylabel(what)
        axes.set_ylim(-0.03, 1.03)
    legend_above(figure, both_axes, columns=3)
    return figure


def draw_retention(groups: Groups) -> Figure:
    """A dot a run: retrieval at the two longest lengths over what short prompts have lost."""
    figure, (axes,) = grid(1, width=9.0, height=4.6)
    for number, (title, results) in enumerate(groups.items()):
        lost = [result.numbers["retention/kl"] for result in results]
        axes.plot(
            lost,
            [gained(result) for result in results],
            label=title,
            **(look(number) | {"linestyle": "none"}),
        )
    axes.set_xlabel("KL(base || model) on short prompts (nats a token)")
    axes.set_ylabel("numbers found, mean of the two longest")
    axes.set_ylim(-0.03, 1.03)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def draw_curves(groups: Groups) -> Figure:
    """The first seed's run of each: evaluations in training, and losses, smoothed."""
    runs = [(title, results[0]) for title, results in groups.items()]
    keys = list(dict.fromkeys(key for _, run in runs for row in run.evaluations for key in row))
    evaluated = [
        key
        for key in keys
        if key.startswith(("eval/retention/kl", "eval/nll/"))
        or key.removeprefix("eval/retrieval/").isdecimal()
    ]
    trained = [
        key
        for key in ("preference_loss", "nll_loss", "rewards/accuracies", "grad_norm")
        if any(key in run.curves for _, run in runs)
    ]
    figure, axes = grid(len(evaluated) + len(trained), width=4.2, height=2.8)
    for axis, key in zip(axes, [*evaluated, *trained], strict=True):
        for number, (title, run) in enumerate(runs):
            if key in evaluated:
                points = [(row["step"], row[key]) for row in run.evaluations if key in row]
            else:
                points = _smooth(run.curves, key)
            if points:
                line = look(number) if key in evaluated else {"color": color(number)}
                axis.plot(*zip(*points, strict=True), label=title, **line)
        axis.set_title(key, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
    legend_above(figure, axes, columns=3)
    return figure


def _smooth(curves: Mapping[str, Sequence[float | None]], key: str) -> list[tuple[float, float]]:
    """Means over stretches of steps, at the last step of each."""
    rows = zip(curves["step"], curves.get(key, ()), strict=False)
    values = [(step, value) for step, value in rows if step is not None and value is not None]
    length = max(1, len(values) // CURVE_POINTS)
    stretches = [values[at : at + length] for at in range(0, len(values), length)]
    return [
        (stretch[-1][0], statistics.mean(value for _, value in stretch)) for stretch in stretches
    ]
