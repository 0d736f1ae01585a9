"""Reads the evaluations to compare: of `longpo evaluate`, and of training runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_longpo.engine.metrics import EVALUATION_NAME
from megatron_longpo.engine.report import Run, read_run
from megatron_longpo.errors import UserError
from megatron_longpo.evaluation.output import FILE_NAME, read_evaluation
from megatron_longpo.evaluation.results import Record, flat_numbers

PAIR_KEYS = ("rewards/accuracies", "rewards/margins", "nll_loss")
"""Numbers of a run's last evaluation of data.eval_path that are compared too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """One column of the comparison."""

    name: str
    record: Record
    """See results.py; of a training run, the last evaluation's record."""
    numbers: dict[str, float]
    step: int | None = None
    """Step of these numbers in a training run."""
    history: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """Steps and numbers of all evaluations of a training run."""


def names(paths: Sequence[str]) -> list[str]:
    """Returns the last parts of each path, as few as tell all paths apart."""
    parts = [Path(path).parts for path in paths]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        short = ["/".join(of[-depth:]) for of in parts]
        if len(set(short)) == len(short):
            return short
    raise UserError(f"models ({', '.join(paths)}): one stands twice. Name each once")


def read_evaluated(path: str, name: str) -> Evaluated:
    """Reads a folder with evaluation.json, or a run's folder with metrics.jsonl."""
    folder = Path(path)
    if folder.is_file():
        folder = folder.parent
    if (folder / FILE_NAME).is_file():
        record = read_evaluation(folder / FILE_NAME)["results"]
        return Evaluated(name=name, record=record, numbers=flat_numbers(record))
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(
            f"models ({path}): neither {FILE_NAME} of longpo evaluate nor metrics.jsonl of a "
            "training run is there. Give such a folder"
        )
    return _read_training_run(read_run(str(folder)), name)


def _read_training_run(run: Run, name: str) -> Evaluated:
    """Returns the last evaluation of a run, with all evaluations as its history."""
    history = [(int(row["step"]), _numbers_of_row(row)) for row in run.evaluation]
    if not history:
        raise UserError(
            f"models ({run.folder}): the run has not evaluated. Set data.eval_path or a part of "
            "evaluation when it trains"
        )
    step, numbers = history[-1]
    record: Record = {}
    records = run.folder / EVALUATION_NAME
    if records.is_file():
        for line in records.read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            if found["step"] == step:
                record = {key: value for key, value in found.items() if key != "step"}
    return Evaluated(name=name, record=record, numbers=numbers, step=step, history=history)


def _numbers_of_row(row: dict[str, Any]) -> dict[str, float]:
    prefixes = ("retrieval/", "ends/", "nll/", "retention/")
    numbers = {key.removeprefix("eval/"): value for key, value in row.items() if value is not None}
    return {
        key: float(value)
        for key, value in numbers.items()
        if key.startswith(prefixes) or key in PAIR_KEYS
    }
