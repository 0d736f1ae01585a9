"""Histograms of an examples file, as SVG inside a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_longpo.generation.report.summary import counts_of
from megatron_longpo.generation.shards.example_lengths import ExampleLengths

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = (
    ("document", "document", "tokens"),
    ("chunk", "chunk asked about", "tokens"),
    ("position", "where the chunk stands", "0 = document's beginning, 1 = its end"),
    ("question", "question", "tokens"),
    ("chosen", "chosen answer", "tokens"),
    ("rejected", "rejected answer", "tokens"),
)
"""Length, title and unit of each panel."""

COLUMNS = 3
NUM_BINS = 30
COLOUR = "#3b6ea5"


def histograms_svg(lengths: Sequence[ExampleLengths]) -> str:
    """Draws a panel for each length; documents count once, everything else once a turn."""
    # Figure without pyplot: it draws without a display and leaves no global state.
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = -(-len(PANELS) // COLUMNS)
    # Text stays text, which is small and can be searched; the same numbers give the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "longpo", "font.size": 9}):
        figure = Figure(figsize=(3.6 * COLUMNS, 2.5 * rows), layout="constrained")
        FigureCanvasSVG(figure)
        for index, (name, title, unit) in enumerate(PANELS):
            _draw(
                figure.add_subplot(rows, COLUMNS, index + 1),
                counts_of(lengths, name),
                title,
                unit,
                bounds=(0.0, 1.0) if name == "position" else None,
            )
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]  # a page has no XML declaration


def _draw(
    axes: Axes,
    values: Sequence[float],
    title: str,
    unit: str,
    *,
    bounds: tuple[float, float] | None,
) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.hist(values, bins=NUM_BINS, range=bounds, color=COLOUR)
    axes.set_title(title)
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
