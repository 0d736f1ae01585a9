"""Under torchrun: the reference scored under one layout, training on it under another.

    torchrun --nproc-per-node 2 tests/reference/reference_ranks.py SHELF FOLDER

Prints `same: SCORED UNDER, TRAINED UNDER` for each pair of layouts whose metrics are those of an
online run.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_longpo.parallel import groups
from megatron_longpo.parallel.groups import ParallelSizes
from megatron_longpo.training import loop
from tests.parity.cases import REFERENCE, Case
from tests.parity.harness import Shelf
from tests.parity.rank_cases import CP2, CP2_A2A, DP2, INTERLEAVED, PP2, TP2_SP
from tests.reference.cached_runs import assert_same_rows, cached_config, case_of, compute
from tests.training.short_runs import TIMES, short_config

RUNS = (
    (TP2_SP, DP2, "longpo"),
    (PP2, CP2_A2A, "dpo"),
    (CP2_A2A, INTERLEAVED, "longpo"),
    (CP2, DP2, "solopo_dpo"),
    (DP2, TP2_SP, "solopo_dpo"),
    (INTERLEAVED, PP2, "longpo"),
)
"""Layout to score under, layout to train under, objective."""
STEPS = 3


def two_layers(name: str) -> Case:
    """Models that a pipeline can split."""
    case = case_of(name)
    return replace(
        case,
        policy=replace(case.policy, layers=2),
        reference=replace(REFERENCE, tied=True),
    )


def main() -> None:
    shelf, folder = Shelf(Path(sys.argv[1])), Path(sys.argv[2])
    torch.set_num_threads(1)
    groups.initialize(ParallelSizes(), timeout_minutes=2)
    for scored_under, layout, name in RUNS:
        case = two_layers(name)
        cache = folder / f"{scored_under.name} {name}"
        scoring = cached_config(
            shelf,
            folder / "scored",
            cache,
            case=case,
            parallel=scored_under.parallel,
        )
        compute(scoring)
        parallel = layout.parallel
        cached = cached_config(shelf, folder / "run", cache, case=case, parallel=parallel)
        online = short_config(shelf, folder / "run", case=case, parallel=parallel)
        mine, theirs = steps_of(cached), steps_of(online)
        assert_same_rows(mine, theirs)
        if dist.get_rank() == 0:
            print(f"same: {scored_under.name}, {layout.name}", flush=True)
    dist.barrier()
    groups.shutdown()


def steps_of(config: loop.TrainConfig) -> list[dict[str, float]]:
    run = loop.prepare(config)
    rows = [loop.train_step(run) for _ in range(STEPS)]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]  # type: ignore[misc]


if __name__ == "__main__":
    main()
