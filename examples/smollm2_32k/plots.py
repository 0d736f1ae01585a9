"""Plots of the study: retrieval by length, gained against lost, and curves over training.

Plain matplotlib without pyplot: it draws without a display and leaves no global state.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.smollm2_32k.results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Groups = Mapping[str, Sequence[Result]]
"""Results by the title of their line in the table."""

MARKERS = "os^Dv<>Ph*"
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
    names = []
    for name, figure in figures.items():
        if figure is None:
            continue
        partial = folder / f"{name}.partial"
        figure.savefig(partial, format="png", dpi=120)
        os.replace(partial, folder / name)
        names.append(name)
    return names


def retrieval(result: Result) -> dict[int, float]:
    """Shares of numbers found, by length."""
    found = {
        key.removeprefix("retrieval/"): value
        for key, value in result.numbers.items()
        if key.startswith("retrieval/")
    }
    return {int(length): found[length] for length in sorted(found, key=len) if length.isdecimal()}


def tokens(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def draw_retrieval(groups: Groups) -> Figure:
    """Means over seeds; bars from the least to the most."""
    figure, (axes,) = _figure(1, width=9.0, height=4.6)
    for number, (title, results) in enumerate(groups.items()):
        by_length = [retrieval(result) for result in results]
        lengths = sorted(by_length[0])
        means = [statistics.mean(found[length] for found in by_length) for length in lengths]
        lows = [m - min(f[n] for f in by_length) for n, m in zip(lengths, means, strict=True)]
        highs = [max(f[n] for f in by_length) - m for n, m in zip(lengths, means, strict=True)]
        axes.errorbar(lengths, means, yerr=[lows, highs], capsize=3, label=title, **_look(number))
    axes.set_xscale("log", base=2)
    ticks = sorted({length for found in groups.values() for length in retrieval(found[0])})
    axes.set_xticks(ticks, [tokens(length) for length in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.set_ylabel("numbers found")
    axes.set_ylim(-0.03, 1.03)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def draw_retention(groups: Groups) -> Figure:
    """A dot a run: retrieval at the two longest lengths over what short prompts have lost."""
    figure, (axes,) = _figure(1, width=9.0, height=4.6)
    for number, (title, results) in enumerate(groups.items()):
        gained = [statistics.mean(list(retrieval(result).values())[-2:]) for result in results]
        lost = [result.numbers["retention/kl"] for result in results]
        axes.plot(lost, gained, label=title, **(_look(number) | {"linestyle": "none"}))
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
    figure, axes = _figure(len(evaluated) + len(trained), width=4.2, height=2.8)
    for axis, key in zip(axes, [*evaluated, *trained], strict=True):
        for number, (title, run) in enumerate(runs):
            if key in evaluated:
                points = [(row["step"], row[key]) for row in run.evaluations if key in row]
            else:
                points = _smooth(run.curves, key)
            if points:
                look = _look(number) if key in evaluated else {"color": f"C{number % 10}"}
                axis.plot(*zip(*points, strict=True), label=title, **look)
        axis.set_title(key, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
    by_label = {
        label: line
        for axis in axes
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        by_label.values(), by_label.keys(), loc="outside upper center", ncols=3, fontsize=8
    )
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


def _figure(panels: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(panels)]
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    return figure, axes


def _look(number: int) -> dict[str, Any]:
    return {
        "color": f"C{number % 10}",
        "marker": MARKERS[number % len(MARKERS)],
        "linewidth": 1.4,
        "markersize": 5,
    }
