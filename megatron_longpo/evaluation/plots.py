"""Draws the plots of a comparison: heat maps, accuracy by length, retention, curves by step.

Uses matplotlib without pyplot: it needs no display and leaves no global state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from megatron_longpo.config.names import RetrievalKind
from megatron_longpo.evaluation.compared import Evaluated
from megatron_longpo.evaluation.figures import (
    color,
    grid,
    legend_above,
    length_axis,
    look,
    save_figures,
    tokens,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


HEATMAP = "retrieval_heatmap.png"
BY_LENGTH = "retrieval_by_length.png"
NLL = "nll_by_position.png"
RETENTION = "retention.png"
SUITES = "suites_by_length.png"
CURVES = "curves.png"


def draw_all(evaluated: Sequence[Evaluated], folder: Path) -> list[str]:
    """Draws every plot for which a model has numbers; returns the file names."""
    figures = {
        HEATMAP: draw_heatmaps(evaluated),
        BY_LENGTH: draw_by_length(evaluated),
        NLL: draw_nll(evaluated),
        RETENTION: draw_retention(evaluated),
        SUITES: draw_suites(evaluated),
        CURVES: draw_curves(evaluated),
    }
    return save_figures(figures, folder, dpi=130)


def draw_heatmaps(evaluated: Sequence[Evaluated]) -> Figure | None:
    """Draws a panel for each model and kind: length to the right, depth down, exact matches."""
    panels = []
    for one in evaluated:
        cells = one.record.get("retrieval", [])
        kinds = list(dict.fromkeys(cell["kind"] for cell in cells))
        panels += [(one.name, kind, [c for c in cells if c["kind"] == kind]) for kind in kinds]
    if not panels:
        return None
    several_kinds = len({kind for _, kind, _ in panels}) > 1
    columns = len({kind for _, kind, _ in panels}) if several_kinds else 3
    figure, axes = grid(len(panels), width=4.2, height=3.4, columns=columns)
    for axis, (name, kind, cells) in zip(axes, panels, strict=True):
        _draw_heatmap(axis, cells)
        axis.set_title(f"{name}\n{kind}" if several_kinds else name, fontsize=10)
    figure.colorbar(axes[0].images[0], ax=axes, label="exact match", shrink=0.8)
    return figure


def _draw_heatmap(axes: Axes, cells: Sequence[dict[str, Any]]) -> None:
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    values = [[math.nan] * len(lengths) for _ in depths]
    for cell in cells:
        values[depths.index(cell["depth"])][lengths.index(cell["length"])] = cell["exact"]
    axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.grid(False)
    for row, depth_values in enumerate(values):
        for column, value in enumerate(depth_values):
            if not math.isnan(value):
                color = "black" if value > 0.6 else "white"
                axes.text(
                    column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color
                )
    axes.set_xticks(range(len(lengths)), [tokens(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("depth")


def draw_by_length(evaluated: Sequence[Evaluated]) -> Figure | None:
    """Draws exact matches by length, a line for each model, dashed for written answers; in a second
    panel, the share of answers that are ended."""
    series = [
        (panel, one.name if style == "-" else f"{one.name}, written", number, style, points)
        for number, one in enumerate(evaluated)
        for panel, prefix, style in (
            *(("exact match", "retrieval/", "-"), ("exact match", "generated/", "--")),
            ("answers ended", "ends/", "-"),
        )
        if (points := _by_length(one.numbers, prefix))
    ]
    if not series:
        return None
    panels = list(dict.fromkeys(panel for panel, *_ in series))
    figure, all_axes = grid(len(panels), width=5.2, height=4.0)
    for panel, axes in zip(panels, all_axes, strict=True):
        for other, label, number, style, points in series:
            if other == panel:
                axes.plot(*zip(*points, strict=True), style, label=label, **look(number))
        length_axis(axes, sorted({length for *_, points in series for length, _ in points}))
        axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel(panel)
        axes.set_xlabel("length (tokens)")
    legend_above(figure, all_axes, columns=3)
    return figure


def draw_nll(evaluated: Sequence[Evaluated]) -> Figure | None:
    """Draws nats per token by position, a line for each model, a point at each bucket's end."""
    having = [(number, one) for number, one in enumerate(evaluated) if one.record.get("nll")]
    if not having:
        return None
    figure, (axes,) = grid(1, width=6.4, height=4.2)
    for number, one in having:
        buckets = one.record["nll"]
        stops, values = [b["stop"] for b in buckets], [b["nll"] for b in buckets]
        axes.plot(stops, values, label=one.name, **look(number))
    length_axis(axes, sorted({b["stop"] for _, one in having for b in one.record["nll"]}))
    axes.set_ylabel("NLL (nats a token)")
    axes.set_xlabel("positions up to")
    axes.legend(fontsize=8)
    return figure


def draw_retention(evaluated: Sequence[Evaluated]) -> Figure | None:
    """Draws what was gained against what was lost: mean retrieval over the KL to the base model.
    Beside it, bars of the share of equal first choices."""
    having = [
        (number, one) for number, one in enumerate(evaluated) if "retention/kl" in one.numbers
    ]
    if not having:
        return None
    figure, (left, right) = grid(2, width=4.8, height=4.0)
    for number, one in having:
        kl, agreement = one.numbers["retention/kl"], one.numbers["retention/agreement"]
        right.bar(number, agreement, color=color(number))
        right.text(number, agreement, f"{agreement:.3f}", ha="center", va="bottom", fontsize=8)
        points = _by_length(one.numbers, "retrieval/")
        if points:
            mean = sum(value for _, value in points) / len(points)
            dot = {**look(number), "linestyle": "none", "markersize": 9}
            left.plot(kl, mean, label=one.name, **dot)
    left.set_xlabel("KL(base || model) on short prompts (nats)")
    left.set_ylabel("retrieval, mean over lengths")
    left.set_ylim(-0.03, 1.03)
    left.margins(x=0.1)
    left.set_xlim(left=min(0.0, left.get_xlim()[0]))
    left.set_title("gained and lost", fontsize=10)
    if left.lines:
        left.legend(fontsize=8)
    right.set_xticks(
        [n for n, _ in having], [one.name for _, one in having], rotation=20, ha="right"
    )
    right.set_ylim(0, 1.1)
    right.set_title("same first choice as the base", fontsize=10)
    return figure


def draw_suites(evaluated: Sequence[Evaluated]) -> Figure | None:
    """Draws a panel for each suite with lengths and each of its tasks; a line for each model."""
    prefixes = {
        key.removesuffix(length)
        for one in evaluated
        for key in one.numbers
        if key.startswith("suite/") and (length := key.rpartition("/")[2]).isdecimal()
    }
    if not prefixes:
        return None
    figure, axes = grid(len(prefixes), width=3.4, height=2.6, columns=4)
    for axis, prefix in zip(axes, sorted(prefixes, key=lambda p: (p.count("/"), p)), strict=True):
        lengths = set()
        for number, one in enumerate(evaluated):
            if points := _by_length(one.numbers, prefix):
                axis.plot(*zip(*points, strict=True), label=one.name, **look(number))
                lengths |= {length for length, _ in points}
        length_axis(axis, sorted(lengths))
        axis.set_ylim(-0.03, 1.03)
        axis.set_title(prefix.removeprefix("suite/").rstrip("/"), fontsize=10)
    axes[0].legend(fontsize=8)
    return figure


def draw_curves(evaluated: Sequence[Evaluated]) -> Figure | None:
    """Draws a panel for each number over training steps; models without steps are dotted lines."""
    runs = [(number, one) for number, one in enumerate(evaluated) if len(one.history) > 1]
    if not runs:
        return None
    from matplotlib.ticker import MaxNLocator

    keys = [
        key
        for key in dict.fromkeys(key for _, one in runs for key in one.numbers)
        # Numbers of one kind are in the table and the heat maps.
        if not set(key.split("/")) & set(get_args(RetrievalKind))
    ]
    figure, axes = grid(len(keys), width=4.2, height=2.8)
    for axis, key in zip(axes, keys, strict=True):
        for number, one in enumerate(evaluated):
            points = [(step, numbers[key]) for step, numbers in one.history if key in numbers]
            if len(points) > 1:
                axis.plot(*zip(*points, strict=True), label=one.name, **look(number))
            elif key in one.numbers:
                axis.axhline(one.numbers[key], color=color(number), linestyle=":", label=one.name)
        axis.set_title(key, fontsize=10)
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if key.startswith(("retrieval/", "ends/", "retention/agreement", "rewards/accuracies")):
            axis.set_ylim(-0.03, 1.03)
    legend_above(figure, axes, columns=4)
    return figure


def _by_length(numbers: dict[str, float], prefix: str) -> list[tuple[int, float]]:
    """Returns (length, value) of keys such as `retrieval/4096`, without those of one kind."""
    rest = {key.removeprefix(prefix): v for key, v in numbers.items() if key.startswith(prefix)}
    return sorted((int(length), value) for length, value in rest.items() if length.isdecimal())
