"""`longpo report`: plots metrics.jsonl of one or several runs and prints a summary."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_longpo.config.report import ReportConfig
from megatron_longpo.engine.metric_names import loss_parts
from megatron_longpo.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS_FILE = "metrics.jsonl"

PANELS_BEHIND = (
    "rewards/margins",
    "rewards/accuracies",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
)
"""Metrics whose panels follow those of the loss and its parts."""

UNITS = {
    "loss": "nats",
    "preference_loss": "nats",
    "nll_loss": "nats a token",
    "answer_nll_loss": "nats a token",
    "divergence_loss": "nats a token",
    "rewards/margins": "nats x beta",
    "rewards/accuracies": "share of pairs",
    "tokens_per_second": "tokens/s",
}
"""What the vertical axis of a panel counts, where it has a unit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The rows of one metrics.jsonl, split into training and evaluation."""

    name: str
    folder: Path
    training: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [*self.training, *self.evaluation]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Returns steps and values of a key; keys with `eval/` come from evaluation rows."""
        rows = self.evaluation if key.startswith("eval/") else self.training
        points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]
        return [step for step, _ in points], [value for _, value in points]


def run_report(config: ReportConfig) -> None:
    """Plots all runs into one PNG and prints a summary."""
    if not config.runs:
        raise UserError("runs is empty. Give at least one folder that a training run logged to")
    runs = [read_run(path) for path in config.runs]
    output = Path(config.output) if config.output else runs[0].folder / "report.png"
    if output.suffix.lower() != ".png":
        raise UserError(f"output ({output}) must end in .png")
    plot(runs, output)
    print_summary(runs)
    print(f"plot: {output}")


def read_run(path: str) -> Run:
    """Reads `<path>/metrics.jsonl`; leaves out a half-written last line of a live run."""
    file = Path(path)
    if file.is_dir():
        file = file / METRICS_FILE
    if not file.is_file():
        raise UserError(
            f"runs ({path}): no {METRICS_FILE} there. Give the logging.dir of a training run"
        )
    rows: list[dict[str, Any]] = []
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise UserError(f"{file}:{number}: not a JSON object. Remove the line") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{file}:{number}: no integer `step`. Remove the line")
        rows.append(row)
    if not rows:
        raise UserError(f"{file} is empty. The run has not finished a step")
    return Run(
        name=path.rstrip("/"),
        folder=file.parent,
        training=[row for row in rows if "loss" in row],
        evaluation=[row for row in rows if any(key.startswith("eval/") for key in row)],
    )


def plot(runs: Sequence[Run], output: Path) -> None:
    """Draws one panel a metric and one line a run, with dots for evaluations."""
    # Figure without pyplot: it draws without a display and leaves no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = panels_of(runs)
    columns = min(2, len(panels)) or 1
    rows = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(5.5 * columns, 3.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for index, key in enumerate(panels):
        _draw_panel(figure.add_subplot(rows, columns, index + 1), runs, key)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    figure.savefig(partial, format="png", dpi=120)
    os.replace(partial, output)


def panels_of(runs: Sequence[Run]) -> list[str]:
    """Returns the metrics that some run has a value of: the loss, its parts, then the others."""
    names = {key.removeprefix("eval/") for run in runs for row in run.rows for key in row}
    return [
        key
        for key in ("loss", *loss_parts(names), *PANELS_BEHIND)
        if any(run.series(name)[0] for run in runs for name in (key, f"eval/{key}"))
    ]


def _draw_panel(axes: Axes, runs: Sequence[Run], key: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, run in enumerate(runs):
        color = f"C{number % 10}"
        axes.plot(*run.series(key), color=color, linewidth=1.2, label=run.name)
        steps, values = run.series(f"eval/{key}")
        if steps:
            axes.plot(steps, values, "o--", color=color, label=f"{run.name}, evaluation")
    axes.set_title(key, fontsize=10)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(UNITS.get(key, ""))
    axes.grid(alpha=0.3)
    if len(runs) > 1 or any(run.series(f"eval/{key}")[0] for run in runs):
        axes.legend(fontsize=7)


def print_summary(runs: Sequence[Run]) -> None:
    """Prints a table for each run with the first and last value of each metric."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for run in runs:
        table = Table("metric", "first", "last", "change", title=run.name, title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for key in [*panels_of([run]), *_evaluation_keys(run)]:
            steps, values = run.series(key)
            if values:
                first, last = values[0], values[-1]
                table.add_row(key, f"{first:.4g}", f"{last:.4g}", f"{last - first:+.3g}")
        console.print(table)
        steps, _ = run.series("loss")
        if steps:
            console.print(f"steps {steps[0]} to {steps[-1]}", highlight=False)


def _evaluation_keys(run: Run) -> list[str]:
    keys = {key: None for row in run.evaluation for key in row if key.startswith("eval/")}
    return list(keys)
