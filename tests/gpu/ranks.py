"""Under torchrun on two or four GPUs: bf16 steps of every layout against the fp32 oracle.

    torchrun --nproc-per-node 2 tests/gpu/ranks.py FOLDER

FOLDER is a `Bf16Shelf` whose models and rows are made already.
"""

from __future__ import annotations

import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_longpo.parallel import groups
from megatron_longpo.parallel.groups import ParallelSizes
from tests.gpu.steps import CASES, Bf16Shelf, check_step, run_step
from tests.parity.harness import oracle_for

OVERLAP = {"overlap_grad_reduce": True}
TWO: dict[str, tuple[ParallelSizes, dict[str, Any]]] = {
    "data 2": (ParallelSizes(), {}),
    "data 2 overlapped": (ParallelSizes(), {"optimizer": OVERLAP}),
    "context 2 all_gather": (ParallelSizes(context=2), {}),
    "context 2 a2a": (ParallelSizes(context=2, context_inner=2), {}),
    "tensor 2": (ParallelSizes(tensor=2, sequence=True), {}),
    "pipeline 2": (ParallelSizes(pipeline=2), {}),
    "pipeline 2 interleaved": (
        ParallelSizes(pipeline=2, virtual_pipeline=2),
        {"layout": "E|t|t|L"},
    ),
}
FOUR: dict[str, tuple[ParallelSizes, dict[str, Any]]] = {
    "tensor 2, pipeline 2": (ParallelSizes(tensor=2, pipeline=2, sequence=True), {}),
    "tensor 2, context 2 a2a": (
        ParallelSizes(tensor=2, sequence=True, context=2, context_inner=2),
        {},
    ),
    "context 4 all_gather": (ParallelSizes(context=4), {}),
    "context 4 a2a+all_gather": (ParallelSizes(context=4, context_inner=2), {}),
    "data 2, tensor 2": (ParallelSizes(tensor=2, sequence=True), {}),
}
LAYOUTS = {2: TWO, 4: FOUR}
"""By world size."""


def main() -> None:
    shelf = Bf16Shelf(Path(sys.argv[1]))
    world_size = groups.initialize(ParallelSizes(), timeout_minutes=5).world_size
    failed = False
    for case in CASES[:2]:
        oracle = oracle_for(case, shelf)
        for name, (sizes, settings) in LAYOUTS[world_size].items():
            ranks = groups.initialize(sizes, timeout_minutes=5)
            # The distributed optimizer leaves each rank a part of the summed gradient.
            whole = replace(case, distributed_optimizer=False)
            ours = run_step(whole, shelf, ranks, **settings)
            if not ranks.is_main:
                continue
            try:
                check_step(ours, oracle)
                print(f"same: {name} {case.name}", flush=True)
            except AssertionError:
                failed = True
                print(f"differs: {name} {case.name}\n{traceback.format_exc()}", flush=True)
    dist.barrier()
    groups.shutdown()
    sys.exit(failed)


if __name__ == "__main__":
    main()
