"""Under torchrun: every layout and case of this world size against the oracle.

    torchrun --nproc-per-node 2 tests/parity/ranks.py FOLDER

FOLDER is a `Shelf` whose models and rows are made already. Ranks are started once; the process
groups change from layout to layout. Prints `same: LAYOUT CASE` for each that holds.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_longpo.parallel import groups
from tests.oracle import OracleResult
from tests.parity.harness import Shelf, compare, oracle_for, run_case
from tests.parity.rank_cases import rank_runs


def main() -> None:
    shelf = Shelf(Path(sys.argv[1]))
    torch.set_num_threads(1)
    started = groups.initialize(groups.ParallelSizes(), timeout_minutes=2)
    oracles: dict[str, OracleResult] = {}
    failed = False
    for layout, case in rank_runs(started.world_size):
        rank_groups = groups.initialize(layout.sizes, timeout_minutes=2)
        ours = run_case(case, shelf, rank_groups, context_comm=layout.comm)
        if rank_groups.is_main:
            if case.name not in oracles:
                oracles[case.name] = oracle_for(case, shelf)
            try:
                compare(ours, oracles[case.name], beta=case.objective.beta or 0.0)
                print(f"same: {layout.name} {case.name}", flush=True)
            except AssertionError:
                failed = True
                print(f"differs: {layout.name} {case.name}\n{traceback.format_exc()}", flush=True)
    dist.barrier()
    groups.shutdown()
    sys.exit(failed)


if __name__ == "__main__":
    main()
