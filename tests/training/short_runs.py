"""Settings of short training runs on tiny models, and what their metrics say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_longpo.config.evaluation import EvaluationConfig
from megatron_longpo.config.train import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    resolve,
)
from tests.parity.cases import ALL_SHAPES, REFERENCE, Case, TinyModel
from tests.parity.harness import Shelf, train_config

POLICY = TinyModel(family="qwen2", layers=1)
CASE = Case(
    name="short_runs",
    shapes=ALL_SHAPES,
    policy=POLICY,
    reference=replace(REFERENCE, layers=1),
)
NUM_PAIRS = len(ALL_SHAPES)

TIMES = (
    "step_time_s",
    "tokens_per_second",
    "model_tflops_per_gpu",
    "peak_memory_gib",
    "eval/time_s",
)
"""Keys outside any equality of runs."""


def short_config(
    shelf: Shelf,
    folder: Path,
    *,
    case: Case = CASE,
    steps: int | None = 4,
    data: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    checkpoint: dict[str, Any] | None = None,
    logging: dict[str, Any] | None = None,
    parallel: ParallelConfig | None = None,
    evaluation: EvaluationConfig | None = None,
) -> TrainConfig:
    """Four steps of three pairs each, on ten pairs; `folder` is logging.dir."""
    config = train_config(
        case,
        shelf,
        parallel=parallel,
        data=DataConfig(**{"path": shelf.rows_file(case), "max_length": 2000, **(data or {})}),
        train=RunConfig(
            **{"global_batch_pairs": 3, "steps": steps, "recompute": "none", **(train or {})}
        ),
        optimizer=OptimizerConfig(**{"lr": 1e-3, "warmup_ratio": 0.3, **(optimizer or {})}),
        checkpoint=CheckpointConfig(**{"interval": 0, **(checkpoint or {})}),
        logging=LoggingConfig(**{"dir": str(folder), "tensorboard": False, **(logging or {})}),
        evaluation=evaluation or EvaluationConfig(),
    )
    return resolve(config)


def metric_rows(folder: Path, *, with_times: bool = False) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    if with_times:
        return rows
    return [{key: row[key] for key in row if key not in TIMES} for row in rows]
