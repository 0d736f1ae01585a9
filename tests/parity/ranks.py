"""Under torchrun: every layout and case of this world size against the oracle.

    torchrun --nproc-per-node 2 tests/parity/ranks.py FOLDER

FOLDER is a `Shelf` whose models and rows are made already. Ranks are started once; the process
groups change from layout to layout. Prints `same: LAYOUT CASE` for each that holds.
"""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig

from megatron_longpo.parallel import groups
from megatron_longpo.training import data_parallel
from tests.parity.harness import Shelf, compare, oracle_for, run_case
from tests.parity.rank_cases import rank_runs, step_runs
from tests.parity.steps import compare_steps, oracle_steps, our_steps


def main() -> None:
    shelf = Shelf(Path(sys.argv[1]))
    torch.set_num_threads(1)
    world_size = groups.initialize(groups.ParallelSizes(), timeout_minutes=2).world_size
    oracle_step = functools.cache(lambda case: oracle_for(case, shelf))
    oracle_history = functools.cache(lambda steps: oracle_steps(steps, shelf))
    passed = []
    num_groups = _num_groups()
    for layout, case in rank_runs(world_size):
        rank_groups = groups.initialize(layout.sizes, timeout_minutes=2)
        ours = run_case(case, shelf, rank_groups, parallel=layout.parallel)
        if rank_groups.is_main:
            with reported(f"{layout.name} {case.name}", passed):
                compare(ours, oracle_step(case), beta=case.objective.beta or 0.0)
    for layout, steps in step_runs(world_size):
        rank_groups = groups.initialize(layout.sizes, timeout_minutes=2)
        with small_buckets():
            history = our_steps(steps, shelf, parallel=layout.parallel)
        if rank_groups.is_main:
            with reported(f"{layout.name} {steps}", passed):
                compare_steps(history, oracle_history(replace(steps, overlap=False)))
    if groups.initialize(groups.ParallelSizes(), timeout_minutes=2).is_main:
        with reported("no group of a former layout is left", passed):
            assert _num_groups() == num_groups
    dist.barrier()
    groups.shutdown()
    sys.exit(not all(passed))


def _num_groups() -> int:
    return len(dist.distributed_c10d._world.pg_map)


def small_buckets() -> Any:
    """DDP sends gradients and weights in many parts, as it does those of a large model."""
    config = functools.partial(DistributedDataParallelConfig, bucket_size=2_000)
    return mock.patch.object(data_parallel, "DistributedDataParallelConfig", config)


@contextmanager
def reported(name: str, passed: list[bool]) -> Iterator[None]:
    try:
        yield
    except AssertionError:
        passed.append(False)
        print(f"differs: {name}\n{traceback.format_exc()}", flush=True)
    else:
        passed.append(True)
        print(f"same: {name}", flush=True)


if __name__ == "__main__":
    main()
