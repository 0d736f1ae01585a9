"""`longpo evaluate --compare`: compares evaluations in a table, files and plots."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_longpo.data.jsonl import write_whole
from megatron_longpo.errors import UserError
from megatron_longpo.evaluation.compared import Evaluated, names, read_evaluated
from megatron_longpo.evaluation.plots import draw_all

HIGHER_IS_BETTER = (
    *("retrieval/", "ends/", "generated/", "retention/agreement", "rewards/", "suite/"),
)


def run_compare(paths: Sequence[str], output: Path) -> None:
    """Reads evaluations, writes files and prints a table; if one cannot be read, writes nothing."""
    evaluated = [read_evaluated(path, name) for path, name in zip(paths, names(paths), strict=True)]
    if not evaluated:
        raise UserError(
            "models is empty. Give what longpo evaluate wrote, or logging.dir folders of runs"
        )
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "comparison.json", json_text(evaluated))
    write_whole(output / "comparison.csv", csv_text(evaluated))
    write_whole(output / "comparison.md", markdown_text(evaluated))
    plots = draw_all(evaluated, output)
    print_table(evaluated)
    for path in ("comparison.json", "comparison.csv", "comparison.md", *plots):
        print(output / path)


def keys_of(evaluated: Sequence[Evaluated]) -> list[str]:
    """Returns the keys of all numbers, in order of first appearance."""
    return list(dict.fromkeys(key for one in evaluated for key in one.numbers))


def best_of(key: str, evaluated: Sequence[Evaluated]) -> float | None:
    """Returns the best value of a number; None with fewer than two values, or all equal."""
    values = [one.numbers[key] for one in evaluated if key in one.numbers]
    if len(values) < 2 or len(set(values)) == 1:
        return None
    return max(values) if key.startswith(HIGHER_IS_BETTER) else min(values)


def json_text(evaluated: Sequence[Evaluated]) -> str:
    """Returns numbers, records and histories of all models as JSON."""
    contents = [
        {
            "name": one.name,
            "step": one.step,
            "numbers": one.numbers,
            "results": one.record,
            "history": [{"step": step, **numbers} for step, numbers in one.history],
        }
        for one in evaluated
    ]
    return json.dumps(contents, indent=2) + "\n"


def csv_text(evaluated: Sequence[Evaluated]) -> str:
    """Returns one line for each model and one column for each number; missing numbers are empty."""
    keys = keys_of(evaluated)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "step", *keys])
    for one in evaluated:
        step = "" if one.step is None else one.step
        writer.writerow([one.name, step, *(one.numbers.get(key, "") for key in keys)])
    return text.getvalue()


def markdown_text(evaluated: Sequence[Evaluated]) -> str:
    """Returns one line for each number and one column for each model, the best in bold."""
    lines = [
        "| | " + " | ".join(_title(one) for one in evaluated) + " |",
        "|---|" + "---:|" * len(evaluated),
    ]
    for key in keys_of(evaluated):
        cells = _cells(key, evaluated, best="**{}**")
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def print_table(evaluated: Sequence[Evaluated]) -> None:
    """Prints the table of `markdown_text` to the terminal."""
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column("", no_wrap=True), *(_title(one) for one in evaluated))
    for column in table.columns[1:]:
        column.justify = "right"
    for key in keys_of(evaluated):
        table.add_row(key, *_cells(key, evaluated, best="[bold]{}[/bold]"))
    Console().print(table)


def _cells(key: str, evaluated: Sequence[Evaluated], *, best: str) -> list[str]:
    """Returns one number of every model, empty if missing; the best has the format `best`."""
    highlighted = best_of(key, evaluated)
    cells = []
    for one in evaluated:
        value = one.numbers.get(key)
        text = "" if value is None else f"{value:.4g}"
        cells.append(best.format(text) if value is not None and value == highlighted else text)
    return cells


def _title(one: Evaluated) -> str:
    return one.name if one.step is None else f"{one.name} (step {one.step})"
