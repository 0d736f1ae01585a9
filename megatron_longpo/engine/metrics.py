"""metrics.jsonl, tensorboard and wandb: what a run says about each step."""

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
"""Of every evaluation one record: `step`, and what `evaluation.results` names."""

Metrics = dict[str, float | int | None]


def mean_metrics(sums: Mapping[str, float]) -> Metrics:
    """Turns `run_microbatches`' sums over pairs into means.

    Every key of the contract is there, those of one objective alone where it is that objective.
    """
    means: Metrics = {name: value / sums["pairs"] for name, value in sums.items()}
    del means["pairs"]
    return {**dict.fromkeys(LOSS_KEYS), **means}


def peak_memory_gib() -> float:
    """GPU memory, or without one the process's, at its highest since the start."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


def check_trackers(config: LoggingConfig) -> None:
    """Refuses a tracker whose package is missing, before anything is built for the run."""
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
    """Writes every step to metrics.jsonl and the paced ones to the trackers that were asked for.

    Only one rank makes one.
    """

    def __init__(self, config: LoggingConfig, *, resumed_step: int, settings: Any) -> None:
        """Removes what a run that is resumed wrote after `resumed_step`.

        A run that begins at step 0 evaluates again before its first step: it keeps nothing.
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
            self._trackers.append(_Wandb(config, settings))

    def write(self, metrics: Mapping[str, Any], *, to_trackers: bool = True) -> None:
        """Appends one row; it is on its way to the disk when this returns."""
        self._file.write(json.dumps(_finite_only(metrics)) + "\n")
        self._file.flush()
        if to_trackers:
            step = int(metrics["step"])
            scalars = {k: v for k, v in metrics.items() if k != "step" and v is not None}
            for tracker in self._trackers:
                tracker.write(scalars, step)

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Appends what an evaluation found, cell by cell, to evaluation.jsonl."""
        with self.records_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def keep_rows_until(path: Path, step: int) -> None:
    """Drops rows of later steps and a last line that was cut short by a crash."""
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
    """JSON has no NaN and no infinity."""
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
    def __init__(self, config: LoggingConfig, settings: Any) -> None:
        import wandb

        assert config.wandb is not None
        try:
            self._run = wandb.init(
                project=config.wandb.project,
                name=config.wandb.name,
                mode=config.wandb.mode,
                dir=config.dir,
                config=settings,
            )
        except wandb.Error as error:
            raise UserError(
                f"logging.wandb: {error}; log in, or set logging.wandb.mode to offline"
            ) from error

    def write(self, scalars: Mapping[str, Any], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()
