"""Steps of a tiny model with and without its activations offloaded; under torchrun, two layouts.

    torchrun --nproc-per-node 2 tests/model/offloaded_steps.py FOLDER

FOLDER is a `Shelf` whose models and rows are made already. Prints `same: LAYOUT` for each layout
and kind of recomputation that gives the same numbers and gradients either way.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_longpo.config.train import LoraConfig, ParallelConfig
from megatron_longpo.model import activation_offload
from megatron_longpo.parallel import groups
from megatron_longpo.training import loop
from tests.parity.harness import Shelf, policy_gradients
from tests.training.short_runs import CASE as ONE_LAYER
from tests.training.short_runs import TIMES, short_config

CASE = replace(ONE_LAYER, name="offloaded", policy=replace(ONE_LAYER.policy, layers=2))
LAYOUTS = {
    "TP2": ParallelConfig(tensor=2),
    "CP2": ParallelConfig(context=2),
    "PP2xVPP2": ParallelConfig(pipeline=2, pipeline_layout="E|t|t|L"),
}


@contextmanager
def small_blocks() -> Iterator[None]:
    """Even a tiny model's tensors leave, in several pieces."""
    with (
        mock.patch.object(activation_offload, "SMALLEST_BYTES", 1),
        mock.patch.object(activation_offload, "BLOCK_BYTES", 1024),
    ):
        yield


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """What the first steps of a run were, and the run."""

    metrics: list[dict[str, Any]]
    gradients: list[dict[str, Tensor]]
    """Of every parameter that trains, by name, one dict a step."""
    run: loop.Run


def steps(
    shelf: Shelf,
    folder: Path,
    *,
    recompute: str,
    recompute_layers: int | None = None,
    offload: bool = False,
    lora: LoraConfig | None = None,
    parallel: ParallelConfig | None = None,
    count: int = 2,
) -> Steps:
    config = short_config(
        shelf,
        folder,
        case=replace(CASE, lora=lora, reference=CASE.policy if lora else CASE.reference),
        train={
            "recompute": recompute,
            "recompute_layers": recompute_layers,
            "offload_activations": offload,
        },
        optimizer={"warmup_ratio": 0.0},
        parallel=parallel,
    )
    run = loop.prepare(config)
    rows, gradients = [], []
    for _ in range(count):
        row = loop.train_step(run)
        rows.append({key: row[key] for key in row if key not in TIMES})
        found = policy_gradients(run)
        gradients.append({name: gradient.clone() for name, gradient in found.items()})
    return Steps(metrics=rows, gradients=gradients, run=run)


def compare(ours: Steps, expected: Steps) -> None:
    """Bit for bit."""
    assert ours.metrics == expected.metrics
    for mine, theirs in zip(ours.gradients, expected.gradients, strict=True):
        assert mine.keys() == theirs.keys()
        for name, gradient in mine.items():
            assert torch.equal(gradient, theirs[name]), name
        assert any(gradient.any() for gradient in mine.values())


def main() -> None:
    shelf = Shelf(Path(sys.argv[1]))
    torch.set_num_threads(1)
    groups.initialize(groups.ParallelSizes(), timeout_minutes=2)
    with small_blocks():
        for name, parallel in LAYOUTS.items():
            for recompute in ("none", "all_but_attention"):
                expected, ours = (
                    steps(
                        shelf,
                        shelf.root / "unused",
                        recompute=recompute,
                        offload=offload,
                        parallel=parallel,
                    )
                    for offload in (False, True)
                )
                compare(ours, expected)
                if torch.distributed.get_rank() == 0:
                    print(f"same: {name}, {recompute}", flush=True)
    groups.shutdown()


if __name__ == "__main__":
    main()
