"""Short runs whose reference was scored ahead, and the same ones with it beside the policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_longpo.config.train import (
    ObjectiveConfig,
    ReferenceConfig,
    TrainConfig,
    resolve,
    resolve_reference,
)
from megatron_longpo.reference import run as reference_pass
from megatron_longpo.training import loop
from tests.parity.cases import Case
from tests.parity.harness import Shelf
from tests.training.short_runs import CASE, metric_rows, short_config

CACHED_OBJECTIVES = {
    "longpo": ObjectiveConfig(beta=0.1, preference_weight=0.5),
    "dpo": ObjectiveConfig(name="dpo"),
    "ipo": ObjectiveConfig(name="ipo"),
    "solopo_dpo": ObjectiveConfig(name="solopo_dpo"),
}
"""The objectives that sum a reference's log-probabilities."""

RELATIVE = 1e-6
BETA = 0.1
"""Of every objective above. Rewards and their distances are beta times differences of sums, and may
be next to 0: they are held to the same part of those sums."""
DIFFERENCES = ("rewards/", "alignment_loss")


def case_of(name: str) -> Case:
    return replace(CASE, name=f"cached-{name}", objective=CACHED_OBJECTIVES[name])


def cached_config(
    shelf: Shelf, folder: Path, cache: Path | None = None, *, case: Case = CASE, **sections: Any
) -> TrainConfig:
    """`short_config` in the mode cached."""
    return in_mode_cached(short_config(shelf, folder, case=case, **sections), cache)


def in_mode_cached(online: TrainConfig, cache: Path | None = None) -> TrainConfig:
    reference = ReferenceConfig(
        mode="cached",
        hf_path=online.reference.hf_path,
        context=online.reference.context,
        cache_path=None if cache is None else str(cache),
    )
    return resolve(replace(online, reference=reference))


def compute(config: TrainConfig) -> None:
    """`longpo reference` on the groups of this process."""
    reference_pass.compute(resolve_reference(config))


def train(config: TrainConfig) -> loop.Run:
    run = loop.prepare(config)
    loop.train(run)
    return run


def assert_same_metrics(cached: Path, online: Path) -> None:
    """Every row and key of metrics.jsonl, but for the reference's tokens."""
    assert_same_rows(metric_rows(cached), metric_rows(online))


def assert_same_rows(cached: Sequence[dict[str, Any]], online: Sequence[dict[str, Any]]) -> None:
    assert len(cached) == len(online) > 0
    for mine, theirs in zip(cached, online, strict=True):
        assert mine.keys() == theirs.keys()
        sums = [v for k, v in theirs.items() if "logps/" in k and v is not None]
        noise = RELATIVE * BETA * sum(map(abs, sums))
        for key, expected in theirs.items():
            if key == "reference_tokens":
                assert mine[key] == 0 < expected
                continue
            if expected is None:
                assert mine[key] is None, key
                continue
            is_difference = key.removeprefix("eval/").startswith(DIFFERENCES)
            slack = noise if is_difference else 0.0
            assert math.isfinite(mine[key])
            assert abs(mine[key] - expected) <= RELATIVE * abs(expected) + slack, (
                f"{key} of step {theirs['step']}: {mine[key]}, not {expected}"
            )
