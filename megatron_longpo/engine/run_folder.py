"""The folder of a run, `logging.dir`: checks it before training and writes its config.yaml."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_longpo import __version__
from megatron_longpo.config.train import TrainConfig
from megatron_longpo.data.jsonl import write_whole
from megatron_longpo.errors import UserError
from megatron_longpo.runtime.env import REQUIRED, package_version

CONFIG_NAME = "config.yaml"
METRICS_NAME = "metrics.jsonl"


def check_is_new(config: TrainConfig) -> None:
    """Raises a UserError if the folder already holds a run (for `checkpoint.resume: never`)."""
    assert config.checkpoint.dir is not None, "the config is resolved"
    metrics, checkpoints = Path(config.logging.dir) / METRICS_NAME, Path(config.checkpoint.dir)
    held = None
    if metrics.exists() and metrics.stat().st_size:
        held = metrics
    elif checkpoints.is_dir() and any(checkpoints.glob("iter_*")):
        held = checkpoints
    if held is not None:
        raise UserError(
            f"checkpoint.resume (never): {held} is there from an earlier run; choose another "
            "logging.dir, or use auto to go on from its newest checkpoint"
        )


def check_writable(config: TrainConfig) -> None:
    """Raises a UserError if the run's folders cannot be made or written."""
    assert config.checkpoint.dir is not None, "the config is resolved"
    check_folder("logging.dir", Path(config.logging.dir))
    check_folder("checkpoint.dir", Path(config.checkpoint.dir))


def check_folder(key: str, folder: Path) -> None:
    """Raises a UserError if the folder of the setting `key` cannot be made or written."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        found = "is not writable" if nearest.is_dir() else "is a file"
        raise UserError(f"{key} ({folder}): {nearest} {found}; choose another folder")


def write_config(config: TrainConfig, fingerprints: Mapping[str, str]) -> None:
    """Writes the resolved config, with the versions and fingerprints that a rerun needs."""
    contents = {
        **plain_config(config),
        "versions": package_versions(),
        "fingerprints": dict(fingerprints),
    }
    folder = Path(config.logging.dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CONFIG_NAME, yaml.safe_dump(contents, sort_keys=False))


def plain_config(config: TrainConfig) -> dict[str, Any]:
    """Returns the config as plain mappings and lists."""
    values = plain(dataclasses.asdict(config))
    assert isinstance(values, dict)
    return values


def package_versions() -> dict[str, str]:
    """Returns the versions of this package, Python and the packages that results depend on."""
    versions = {name: package_version(name) or "missing" for name in REQUIRED}
    return {"megatron_longpo": __version__, "python": platform.python_version(), **versions}


def plain(value: Any) -> Any:
    """Returns a value in YAML's safe types: tuples become lists."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
