"""Steps of a tiny model with and without its activations offloaded; under torchrun, two layouts.

    torchrun --nproc-per-node 2 tests/model/offloaded_steps.py FOLDER

FOLDER is a `Shelf` whose models and rows are made already. Prints `same: LAYOUT` for each layout
and kind of recomputation that gives the same numbers either way.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_longpo.config import ParallelConfig
from megatron_longpo.model import activation_offload
from megatron_longpo.parallel import groups
from megatron_longpo.training import loop
from tests.parity.harness import Shelf
from tests.training.short_runs import CASE as ONE_LAYER
from tests.training.short_runs import TIMES, short_config

CASE = replace(ONE_LAYER, name="offloaded", policy=replace(ONE_LAYER.policy, layers=2))
LAYOUTS = {
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


def steps(
    shelf: Shelf,
    folder: Path,
    *,
    recompute: str,
    offload: bool = False,
    parallel: ParallelConfig | None = None,
    count: int = 2,
) -> tuple[list[dict[str, Any]], loop.Run]:
    """Metrics of the first steps, which show gradients (`grad_norm`) and what they did."""
    train = {"recompute": recompute, "offload_activations": offload}
    config = short_config(
        shelf,
        folder,
        case=CASE,
        train=train,
        optimizer={"warmup_ratio": 0.0},
        parallel=parallel,
    )
    run = loop.prepare(config)
    rows = [loop.train_step(run) for _ in range(count)]
    return [{key: row[key] for key in row if key not in TIMES} for row in rows], run


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
                    )[0]
                    for offload in (False, True)
                )
                assert ours == expected, (name, recompute)
                if torch.distributed.get_rank() == 0:
                    print(f"same: {name}, {recompute}", flush=True)
    groups.shutdown()


if __name__ == "__main__":
    main()
