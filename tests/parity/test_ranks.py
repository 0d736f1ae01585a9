"""Every layout gives the oracle's loss, sums and gradients; ranks start once a world size."""

from __future__ import annotations

import pytest

from tests.parity.harness import Shelf
from tests.parity.rank_cases import rank_runs, step_runs
from tests.torchrun import torchrun


@pytest.mark.timeout(600)  # some two hundred steps, and four ranks may have two cores
@pytest.mark.parametrize("world_size", [2, 4])
def test_layouts_give_the_oracles_step(world_size: int, shelf: Shelf) -> None:
    runs = rank_runs(world_size)
    histories = step_runs(world_size)
    # Made here: ranks that made the same folder at once would get in each other's way.
    for case in [*(case for _, case in runs), *(steps.case for _, steps in histories)]:
        shelf.hf_folder(case.policy)
        shelf.rows_file(case)
        if case.reference is not None:
            shelf.hf_folder(case.reference)
    result = torchrun("tests/parity/ranks.py", str(shelf.root), ranks=world_size, timeout_s=540)
    problems = [line for line in result.stdout.splitlines() if line.startswith("differs: ")]
    assert not problems, result.stdout[-4000:]
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("same: ") == len(runs) + len(histories) + 1, result.stdout[-4000:]
