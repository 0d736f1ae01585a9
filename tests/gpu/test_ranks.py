"""Layouts of two and four GPUs, through NCCL, give the oracle's step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.ranks import LAYOUTS
from tests.gpu.steps import CASES, Bf16Shelf
from tests.torchrun import torchrun

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_layouts_give_the_oracles_step(world_size: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs, and there are {torch.cuda.device_count()}")
    shelf = Bf16Shelf(tmp_path)
    for case in CASES[:2]:
        # Made here: ranks that made the same folder at once would get in each other's way.
        shelf.hf_folder(case.policy)
        assert case.reference is not None
        shelf.hf_folder(case.reference)
        shelf.rows_file(case)
    result = torchrun("tests/gpu/ranks.py", str(tmp_path), ranks=world_size)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert result.stdout.count("same: ") == 2 * len(LAYOUTS[world_size]), result.stdout[-4000:]
