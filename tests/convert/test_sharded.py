from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.convert.sharded_round_trip import CASES, prepare
from tests.torchrun import torchrun


def test_models_split_over_ranks_load_and_export_bitwise(
    tmp_path: Path, single_process: Any
) -> None:
    prepare(tmp_path)
    result = torchrun("tests/convert/sharded_round_trip.py", str(tmp_path), ranks=2)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("same: ") == len(CASES), result.stdout
