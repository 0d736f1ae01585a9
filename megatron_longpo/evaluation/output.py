"""`evaluation.json`: the measurements of one model, written whole after every part."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longpo.config.evaluate import EvaluateConfig
from megatron_longpo.data.jsonl import write_whole
from megatron_longpo.engine.run_folder import package_versions
from megatron_longpo.errors import UserError
from megatron_longpo.evaluation.results import Record, flat_numbers
from megatron_longpo.evaluation.retrieval import RetrievalSet

FILE_NAME = "evaluation.json"

DECIDING = ("base", "new_tokens", "rope_theta", "rope_scaling", "dtype", "evaluation")
"""Settings that numbers depend on; other settings may change between parts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationFile:
    """One evaluation, finished or not; only the main rank writes it."""

    path: Path
    settings: Mapping[str, Any]
    """The model's path, and the settings that numbers depend on."""
    record: Record
    is_main: bool

    @staticmethod
    def open(config: EvaluateConfig, model_path: str, *, is_main: bool) -> EvaluationFile:
        """Opens the output, and resumes an evaluation of the same model and settings.

        Raises:
            UserError: if the output holds another evaluation and may not be overwritten.
        """
        path = Path(config.folder) / FILE_NAME
        values = dataclasses.asdict(config)
        if not config.generate:
            values["new_tokens"] = None
        wanted = {"model": model_path, **{key: values[key] for key in DECIDING}}
        settings: dict[str, Any] = json.loads(json.dumps(wanted))
        record: Record = {}
        if is_main and path.exists() and not config.overwrite:
            found = read_evaluation(path)
            was_off = not any((found["settings"].get("evaluation") or {}).values())
            for key, value in settings.items():
                there = found["settings"].get(key)
                if key != "model" and (was_off or config.evaluation.is_off):
                    # One of the evaluations has only suites, which keep settings of their own.
                    settings[key] = value if was_off else there
                    continue
                if key == "new_tokens" and None in (there, value):
                    # One of the evaluations let the model write no answers.
                    settings[key] = there or value
                elif there != value:
                    raise UserError(
                        f"output ({config.output}): {path} was made with another {key}; choose "
                        "another output, or give --overwrite"
                    )
            record = found["results"]
        return EvaluationFile(path=path, settings=settings, record=record, is_main=is_main)

    def has(self, part: str) -> bool:
        """Tells whether a part of `Suite.split` is measured, by its name."""
        name, *rest = part.split()
        if not rest:
            return name in self.record
        kind, length = rest
        return any(
            cell["kind"] == kind and cell["length"] == int(length)
            for cell in self.record.get(name, [])
        )

    def has_generated(self, part: RetrievalSet) -> bool:
        return all("generated" in cell for cell in self._cells(part))

    def add(self, record: Record) -> None:
        """Adds and saves a part."""
        for key, value in record.items():
            if key == "retrieval":
                self.record.setdefault(key, []).extend(value)
            else:
                self.record[key] = value
        self.save()

    def add_generated(self, part: RetrievalSet, found: Sequence[bool]) -> None:
        """Adds and saves which of a part's questions were answered right."""
        for cell in self._cells(part):
            hits = [
                hit
                for question, hit in zip(part.questions, found, strict=True)
                if question.depth == cell["depth"]
            ]
            cell["generated"] = sum(hits) / len(hits)
        self.save()

    def begin_suite(self, name: str, *, mean: str, settings: Mapping[str, Any]) -> None:
        """Adds a suite without cells, unless it is there.

        Raises:
            UserError: if it is there with other settings.
        """
        suites = self.record.setdefault("suites", {})
        wanted = json.loads(json.dumps(settings))
        suite = suites.setdefault(name, {"mean": mean, "settings": wanted, "cells": []})
        for key, value in wanted.items():
            if suite["settings"].get(key) != value:
                raise UserError(
                    f"output ({self.path.parent}): {self.path} has the suite {name} with another "
                    f"{key}; choose another output, or give --overwrite"
                )

    def has_suite(self, name: str) -> bool:
        """Tells whether a suite has any cell."""
        return bool(self.record["suites"][name]["cells"])

    def has_cell(self, suite: str, task: str, length: int | None) -> bool:
        cells = self.record["suites"][suite]["cells"]
        return any((cell["task"], cell["length"]) == (task, length) for cell in cells)

    def add_cells(self, suite: str, cells: Sequence[Record]) -> None:
        """Adds and saves cells of a suite."""
        self.record["suites"][suite]["cells"].extend(cells)
        self.save()

    def save(self, *, complete: bool = False) -> None:
        if not self.is_main:
            return
        contents = {
            "model": self.settings["model"],
            "complete": complete,
            "numbers": flat_numbers(self.record),
            "results": self.record,
            "settings": self.settings,
            "versions": package_versions(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(contents, indent=2) + "\n")

    def _cells(self, part: RetrievalSet) -> list[Record]:
        first = part.questions[0]
        return [
            cell
            for cell in self.record["retrieval"]
            if (cell["kind"], cell["length"]) == (first.kind, first.length)
        ]


def read_evaluation(path: Path) -> dict[str, Any]:
    """Reads an evaluation.json."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); remove it") from None
    if not isinstance(contents, dict) or not {"results", "settings"} <= contents.keys():
        raise UserError(f"{path}: not written by longpo evaluate; remove it, or choose another")
    return contents


def print_numbers(record: Record, *, title: str) -> None:
    """Prints a table of the numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table("measured", "value", title=title, title_justify="left")
    table.columns[1].justify = "right"
    for name, value in flat_numbers(record).items():
        table.add_row(name, f"{value:.4g}")
    Console().print(table)
