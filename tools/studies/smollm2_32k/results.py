"""The result of a run as one small JSON file, and all of them read back."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_longpo.data.jsonl import write_whole
from megatron_longpo.engine.run_folder import package_versions
from tools.studies.smollm2_32k.plan import Run

RECIPE = Path(__file__).resolve().parents[3] / "examples" / "smollm2_32k"
"""The recipe whose YAML files the runs are made by."""

CURVES = (
    "loss",
    "preference_loss",
    "nll_loss",
    "answer_nll_loss",
    "rewards/margins",
    "rewards/accuracies",
    "grad_norm",
    "step_time_s",
)
"""Of the training metrics, what results keep of every step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What is known of a run that has ended."""

    name: str
    group: str
    """The name without the seed."""
    title: str
    seed: int
    iteration: int
    seconds: Mapping[str, float]
    """Of training and of evaluation, each with its start."""
    numbers: Mapping[str, float]
    """Measured afterwards, by the names of `longpo evaluate`; empty where nothing was."""
    record: Mapping[str, Any]
    """What `numbers` are of: every cell of retrieval, buckets of NLL, retention."""
    curves: Mapping[str, Sequence[float | None]]
    """By key a value for every step; `step` has the steps."""
    evaluations: Sequence[Mapping[str, float]]
    """Rows of the evaluations in training."""
    options: Mapping[str, Any]
    device: str
    versions: Mapping[str, str]
    pairs: str | None = None
    """Digest of the pairs that its rows are made of."""
    settings: str | None = None
    """Digest of the files of settings; None where it was not kept yet."""

    @property
    def seconds_per_step(self) -> float | None:
        times = [time for time in self.curves.get("step_time_s", ())[1:] if time is not None]
        return statistics.median(times) if times else None

    def is_by_settings_of(self, run: Run) -> bool:
        """Returns whether that run, made now, would have the same settings."""
        return self.settings in (None, settings_of(run))


def settings_of(run: Run) -> str:
    """Returns a digest of the configs that a run is made by; its options are in its name."""
    names = ["evaluate.yaml"] if run.method is None else ["train.yaml", "evaluate.yaml"]
    contents = [yaml.safe_load((RECIPE / name).read_text(encoding="utf-8")) for name in names]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:8]


def write_result(
    path: Path,
    run: Run,
    *,
    seconds: Mapping[str, float],
    evaluation_file: Path | None,
    metrics_file: Path | None,
    device: str,
    pairs: str | None,
) -> None:
    """Writes the result of a run from the files that it left."""
    evaluation = {} if evaluation_file is None else read_json(evaluation_file)
    rows = []
    if metrics_file is not None:
        lines = metrics_file.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    steps = [row for row in rows if "loss" in row]
    curves = {
        key: [_short(row.get(key)) for row in steps]
        for key in ("step", *CURVES)
        if any(row.get(key) is not None for row in steps)
    }
    method = {} if run.method is None else run.method.options
    contents = {
        "name": run.name,
        "group": run.group,
        "title": run.title,
        "seed": run.seed,
        "iteration": run.iteration,
        "seconds": {key: round(value, 1) for key, value in seconds.items()},
        "numbers": evaluation.get("numbers", {}),
        "record": evaluation.get("results", {}),
        "curves": curves,
        "evaluations": [
            {key: _short(value) for key, value in row.items()}
            for row in rows
            if any(key.startswith("eval/") for key in row)
        ],
        "options": {**method, **run.options},
        "pairs": pairs,
        "settings": settings_of(run),
        "device": device,
        "versions": package_versions(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(contents, separators=(",", ":")) + "\n")


def read_results(folder: Path) -> list[Result]:
    """Returns all results of a folder, by name."""
    return [read_result(path) for path in sorted(folder.glob("run-*.json"))]


def read_result(path: Path) -> Result:
    """Returns the result that `write_result` wrote there."""
    return Result(**read_json(path))


def result_path(folder: Path, run: Run) -> Path:
    return folder / f"run-{run.name}.json"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _short(value: Any) -> Any:
    """Returns a number with six digits, which are enough for a curve."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
