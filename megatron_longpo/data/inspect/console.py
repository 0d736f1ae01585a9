"""Shows a sample and statistics on the console: with colours on a terminal, else with signs."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_longpo.data.inspect.samples import Piece, Sample, Segment
from megatron_longpo.data.inspect.statistics import Statistics

_STYLES = {"answer": "black on green", "chunk": "black on yellow", None: None}
_SIGNS = {"answer": ("\u27e6", "\u27e7"), "chunk": ("\u27ea", "\u27eb"), None: ("", "")}
_LEGEND = (
    Piece(text="answer (labelled)", mark="answer"),
    Piece(text="chunk that a short row holds", mark="chunk"),
)
_HEADINGS = {"shared": "bold cyan", "chosen": "bold green", "rejected": "bold red"}


def show_sample(console: Console, sample: Sample, max_chars: int) -> None:
    """Prints a sample; long texts are cut to `max_chars` at each end."""
    console.print(Text(f"{sample.source}  id {sample.id}, {sample.num_turns} turns", "bold"))
    for fact in sample.facts:
        console.print(Text(fact))
    legend = Text("legend: ")
    for piece in _LEGEND:
        legend.append_text(_piece(console, piece, max_chars)).append("  ")
    console.print(legend)
    for segment in sample.segments:
        console.print(Text(f"\n{_heading(segment)}", _HEADINGS[segment.branch]))
        text = Text()
        for piece in segment.pieces:
            text.append_text(_piece(console, piece, max_chars))
        console.print(text)
    if not any(segment.name.startswith("reference") for segment in sample.segments) and any(
        segment.num_tokens is not None for segment in sample.segments
    ):
        console.print(Text("\nno short reference rows", "bold cyan"))


def _heading(segment: Segment) -> str:
    if segment.num_tokens is None:
        return f"{segment.name}: {sum(len(piece.text) for piece in segment.pieces)} characters"
    return (
        f"{segment.name}: {segment.num_tokens} tokens, {segment.num_answer_tokens} of answers, "
        f"at [{segment.start}, {segment.start + segment.num_tokens})"
    )


def _piece(console: Console, piece: Piece, max_chars: int) -> Text:
    shown = piece.text
    if len(shown) > 2 * max_chars:
        left_out = len(shown) - 2 * max_chars
        shown = f"{shown[:max_chars]}\n[... {left_out} characters ...]\n{shown[-max_chars:]}"
    # Control characters of a document would move the cursor or colour the rest.
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in shown)
    if console.is_terminal:
        return Text(shown, _STYLES[piece.mark] or "")
    opening, closing = _SIGNS[piece.mark]
    return Text(f"{opening}{shown}{closing}")


def show_statistics(console: Console, statistics: Statistics) -> None:
    """Prints a table of the statistics, and their notes."""
    table = Table(
        title=f"{statistics.num_read} of {statistics.num_items} {statistics.kind}",
        title_justify="left",
    )
    for heading in ("", "least", "median", "most", "mean"):
        table.add_column(heading, justify="right" if heading else "left")
    for series in statistics.series:
        values = series.values
        table.add_row(
            f"{series.name}, {series.unit}" if series.unit else series.name,
            *(f"{value:.0f}" for value in (min(values), np.median(values), max(values))),
            f"{np.mean(values):.1f}",
        )
    console.print()
    console.print(table)
    for note in statistics.notes:
        console.print(note)
