"""Under torchrun: the same evaluation under every layout of two ranks.

    torchrun --nproc-per-node 2 tests/evaluation/ranks.py SHELF EXPECTED

EXPECTED is a JSON file with one process's record. Prints `same: LAYOUT` for each that agrees; the
last runs ask the base once, at the start.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_longpo.parallel import groups
from megatron_longpo.parallel.groups import ParallelSizes
from megatron_longpo.training import loop
from tests.evaluation.suites import assert_same_record, evaluation_config
from tests.parity.harness import Shelf
from tests.parity.rank_cases import CP2, CP2_A2A, DP2, INTERLEAVED, PP2, TP2_SP
from tests.training.short_runs import CASE, short_config

MODEL = replace(CASE.policy, layers=2, seed=7)
EVALUATED = replace(CASE, name="evaluated", policy=MODEL, reference=MODEL)
"""One model that a pipeline can split, under two RoPEs; the test makes it favour digits."""

RUNS = (
    *((layout, "online") for layout in (TP2_SP, PP2, DP2, CP2_A2A)),
    (INTERLEAVED, "none"),
    (CP2, "none"),
)


def main() -> None:
    shelf, expected = Shelf(Path(sys.argv[1])), json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(1)
    groups.initialize(ParallelSizes(), timeout_minutes=2)
    for layout, mode in RUNS:
        config = short_config(
            shelf,
            Path(sys.argv[2]).parent,
            case=EVALUATED,
            parallel=layout.parallel,
            evaluation=evaluation_config(shelf.root),
        )
        run = loop.prepare(replace(config, reference=replace(config.reference, mode=mode)))
        _, record = run.evaluation.run(run.model, budget_tokens=run.budget_tokens)
        assert_same_record(record, expected)
        if dist.get_rank() == 0:
            print(f"same: {layout.name} {mode}", flush=True)
    dist.barrier()
    groups.shutdown()


if __name__ == "__main__":
    main()
