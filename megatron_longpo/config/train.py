"""The config of `longpo train`, for those that read it: data classes, loading, checks."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_longpo.config.parser import load_config
from megatron_longpo.config.train_checks import check_world, resolve, resolve_reference
from megatron_longpo.config.train_sections import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    ReferenceConfig,
    RunConfig,
    TrainConfig,
    WandbConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ReferenceConfig",
    "RunConfig",
    "TrainConfig",
    "WandbConfig",
    "check_world",
    "load_train_config",
    "resolve",
    "resolve_reference",
]


def load_train_config(argv: Sequence[str]) -> TrainConfig:
    """Returns the checked and resolved config of `--config X.yaml --section.key value ...`."""
    return load_config(TrainConfig, argv, command="train", resolve=resolve)
