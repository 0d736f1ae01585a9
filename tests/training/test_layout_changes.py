"""Checkpoints of interleaved stages and of overlapped weights are those of any other layout."""

from __future__ import annotations

from tests.parity.harness import Shelf
from tests.torchrun import torchrun
from tests.training.layout_changes import CHANGES, TWO_LAYERS


def test_a_run_goes_on_under_another_layout(shelf: Shelf) -> None:
    shelf.hf_folder(TWO_LAYERS.policy)
    shelf.rows_file(TWO_LAYERS)
    assert TWO_LAYERS.reference is not None
    shelf.hf_folder(TWO_LAYERS.reference)
    result = torchrun("tests/training/layout_changes.py", str(shelf.root), ranks=2)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("same: ") == len(CHANGES), result.stdout[-4000:]
