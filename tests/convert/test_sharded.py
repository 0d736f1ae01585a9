from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.convert.sharded_round_trip import CASES

ROOT = Path(__file__).parents[2]


def test_models_split_over_ranks_load_and_export_bitwise(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", "2", str(ROOT / "tests/convert/sharded_round_trip.py")),
        str(tmp_path),
    ]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("same: ") == len(CASES), result.stdout
