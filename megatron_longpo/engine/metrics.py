"""Writes the metrics of each step to metrics.jsonl, tensorboard and wandb."""

from __future__ import annotations

import importlib.util
import json
import math
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_longpo.config.train import LoggingConfig
from megatron_longpo.data.jsonl import write_whole
from megatron_longpo.engine.metric_names import LOSS_KEYS
from megatron_longpo.errors import UserError

EVALUATION_NAME = "evaluation.jsonl"
"""File with one record an evaluation: `step`, and the results of its suite cell by cell."""

Metrics = dict[str, float | int | None]


def mean_metrics(sums: Mapping[str, float]) -> Metrics:
    """Returns the means of `run_microbatches`' sums over pairs.

    Every key of the contract is there, null if the objective does not give it. Keys that only some
    objectives have are there only with those objectives.
    """
    means: Metrics = {name: value / sums["pairs"] for name, value in sums.items()}
    del means["pairs"]
    return {**dict.fromkeys(LOSS_KEYS), **means}


def peak_memory_gib() -> float:
    """Returns the peak of GPU memory since the start, or of the process's memory without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


def check_trackers(config: LoggingConfig) -> None:
    """Raises a UserError for a tracker whose package is not installed."""
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "logging.tensorboard (true): the package tensorboard is not installed; "
            "pip install tensorboard, or set it to false"
        )
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "logging.wandb: the package wandb is not installed; install the wandb extra, or set it "
            "to null"
        )


class MetricsWriter:
    """Writes every step to metrics.jsonl, and every `logging.interval`th to the trackers.

    Only the main rank makes one.
    """

    def __init__(self, config: LoggingConfig, *, resumed_step: int, run_config: Any) -> None:
        """Opens the files, and removes rows of steps after `resumed_step`.

        A run that begins at step 0 keeps no row: it evaluates again before its first step.
        """
        self.folder = Path(config.dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "metrics.jsonl"
        self.records_path = self.folder / EVALUATION_NAME
        for path in (self.path, self.records_path):
            keep_rows_until(path, resumed_step or -1)
        self._file = self.path.open("a", encoding="utf-8")
        self._trackers: list[Any] = []
        if config.tensorboard:
            self._trackers.append(_Tensorboard(self.folder, purge_step=(resumed_step or -1) + 1))
        if config.wandb is not None:
            self._trackers.append(_Wandb(config, run_config))

    def write(self, metrics: Mapping[str, Any], *, to_trackers: bool = True) -> None:
        """Appends and flushes one row to metrics.jsonl, and sends it to the trackers if asked."""
        self._file.write(json.dumps(_finite_only(metrics)) + "\n")
        self._file.flush()
        if to_trackers:
            step = int(metrics["step"])
            scalars = {k: v for k, v in metrics.items() if k != "step" and v is not None}
            for tracker in self._trackers:
                tracker.write(scalars, step)

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Appends the record of an evaluation to evaluation.jsonl."""
        with self.records_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def keep_rows_until(path: Path, step: int) -> None:
    """Removes rows of steps after `step`, and lines that a crash cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            kept.append(line)
    write_whole(path, "".join(line + "\n" for line in kept))


def _finite_only(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces NaN and infinity, which JSON does not have, by None."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in metrics.items()
    }


class _Tensorboard:
    def __init__(self, folder: Path, *, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

    def write(self, scalars: Mapping[str, Any], step: int) -> None:
        for key, value in scalars.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, config: LoggingConfig, run_config: Any) -> None:
        import wandb

        assert config.wandb is not None
        try:
            self._run = wandb.init(
                project=config.wandb.project,
                name=config.wandb.name,
                mode=config.wandb.mode,
                dir=config.dir,
                config=run_config,
            )
        except wandb.Error as error:
            raise UserError(
                f"logging.wandb: {error}; log in, or set logging.wandb.mode to offline"
            ) from error

    def write(self, scalars: Mapping[str, Any], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()
