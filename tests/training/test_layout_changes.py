"""A checkpoint goes on under any other layout, in one process too."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_longpo.config.train import ParallelConfig
from megatron_longpo.parallel.groups import Groups
from tests.parity.harness import Shelf
from tests.torchrun import torchrun
from tests.training.layout_changes import (
    CHANGES,
    SAVED,
    TP2_PP2,
    TWO_LAYERS,
    Layout,
    compare,
    run,
)
from tests.training.short_runs import metric_rows


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_run_goes_on_under_another_layout(
    world_size: int, shelf: Shelf, tmp_path: Path, single_process: Groups
) -> None:
    shelf.hf_folder(TWO_LAYERS.policy)
    shelf.rows_file(TWO_LAYERS)
    assert TWO_LAYERS.reference is not None
    shelf.hf_folder(TWO_LAYERS.reference)
    result = torchrun("tests/training/layout_changes.py", str(shelf.root), ranks=world_size)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("same: ") == len(CHANGES[world_size]), result.stdout[-4000:]
    if world_size == 4:
        straight = shelf.root / TP2_PP2.name
        saved = straight / "checkpoints" / f"iter_{SAVED:07d}"
        alone = Layout(name="one process", parallel=ParallelConfig())
        resumed = run(shelf, alone, tmp_path, resume=str(saved))
        compare(resumed, metric_rows(straight))
