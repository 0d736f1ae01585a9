"""Under torchrun: combinations of this number of ranks against the oracle.

    torchrun --nproc-per-node 4 tests/parity/combination_ranks.py FOLDER

FOLDER is a `Shelf` whose models and rows are made already. Reads `FOLDER/combinations-4.jsonl` and
writes `FOLDER/results-4.jsonl`, one object a combination.
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
from tests.parity.combinations import Combination
from tests.parity.harness import Shelf
from tests.parity.steps import differences, oracle_steps, our_steps


def main() -> None:
    folder = Path(sys.argv[1])
    # Megatron's, of settings that are meant; an error still ends the run.
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    shelf = Shelf(folder)
    world = groups.initialize(groups.ParallelSizes(), timeout_minutes=5)
    is_main, num_ranks = world.is_main, world.world_size
    oracle = functools.cache(lambda steps: oracle_steps(steps, shelf))
    wanted = (folder / combinations_name(num_ranks)).read_text(encoding="utf-8").splitlines()
    with open(folder / results_name(num_ranks), "a", encoding="utf-8") as results:
        for line in wanted:
            one = Combination(**json.loads(line))
            if is_main:
                print(f"runs: {one}", flush=True)
            history = our_steps(one.steps, shelf, parallel=one.parallel)
            if is_main:
                found = differences(history, oracle(one.steps))
                results.write(json.dumps({"combination": asdict(one), **asdict(found)}) + "\n")
                results.flush()
    groups.shutdown()


def combinations_name(num_ranks: int) -> str:
    return f"combinations-{num_ranks}.jsonl"


def results_name(num_ranks: int) -> str:
    return f"results-{num_ranks}.jsonl"


if __name__ == "__main__":
    main()
