"""Parts of every plot: panels, line styles, axes of lengths, and writing files whole.

Uses matplotlib without pyplot: it needs no display and leaves no global state.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = (*(f"C{number}" for number in range(10)), "black", "gold", "navy")
MARKERS = "os^Dv<>Ph*"


def grid(
    panels: int, *, width: float, height: float, columns: int = 3
) -> tuple[Figure, list[Axes]]:
    """Makes a figure of panels, each `width` by `height` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(panels)]
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    return figure, axes


def color(number: int) -> str:
    """Returns the colour of line `number`."""
    return COLORS[number % len(COLORS)]


def look(number: int) -> dict[str, Any]:
    """Returns colour and marker of line `number`, as arguments of `plot`."""
    return {
        "color": color(number),
        "marker": MARKERS[number % len(MARKERS)],
        "linewidth": 1.4,
        "markersize": 5,
    }


def tokens(length: int) -> str:
    """Returns `32K` for 32,768."""
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    """Makes the x axis logarithmic, with a tick at each length in tokens."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [tokens(length) for length in lengths])
    axes.minorticks_off()


def legend_above(figure: Figure, axes: Sequence[Axes], *, columns: int) -> None:
    """Adds one legend for all panels, with each label once."""
    by_label = {
        label: line
        for axis in axes
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        by_label.values(), by_label.keys(), loc="outside upper center", ncols=columns, fontsize=8
    )


def save_figures(figures: Mapping[str, Figure | None], folder: Path, *, dpi: int) -> list[str]:
    """Writes figures as PNG files, without those that are None; returns the file names."""
    names = []
    for name, figure in figures.items():
        if figure is None:
            continue
        partial = folder / f"{name}.partial"
        figure.savefig(partial, format="png", dpi=dpi)
        os.replace(partial, folder / name)
        names.append(name)
    return names
