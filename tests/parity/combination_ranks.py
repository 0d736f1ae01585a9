"""Under torchrun: every combination of this number of ranks against the oracle.

    torchrun --nproc-per-node 4 tests/parity/combination_ranks.py FOLDER [PART OF_PARTS]

FOLDER is a `Shelf` whose models and rows are made already. Writes `FOLDER/results-4.jsonl`, one
object a combination. With two numbers it runs the PART-th (from 0) of OF_PARTS.
"""

from __future__ import annotations

import functools
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_longpo.parallel import groups
from tests.parity.combinations import combinations_of
from tests.parity.harness import Shelf
from tests.parity.steps import differences, oracle_steps, our_steps


def main() -> None:
    folder, *slice_of = sys.argv[1:]
    part, parts = map(int, slice_of or ("0", "1"))
    # Megatron's, of settings that are meant; an error still ends the run.
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    shelf = Shelf(Path(folder))
    world = groups.initialize(groups.ParallelSizes(), timeout_minutes=5)
    is_main, num_ranks = world.is_main, world.world_size
    oracle = functools.cache(lambda steps: oracle_steps(steps, shelf))
    with open(Path(folder) / results_name(num_ranks), "a", encoding="utf-8") as results:
        for one in combinations_of(num_ranks, part=part, parts=parts):
            if is_main:
                print(f"runs: {one}", flush=True)
            history = our_steps(one.steps, shelf, parallel=one.parallel)
            if is_main:
                found = differences(history, oracle(one.steps))
                results.write(json.dumps({"combination": asdict(one), **asdict(found)}) + "\n")
                results.flush()
    groups.shutdown()


def results_name(num_ranks: int) -> str:
    return f"results-{num_ranks}.jsonl"


if __name__ == "__main__":
    main()
