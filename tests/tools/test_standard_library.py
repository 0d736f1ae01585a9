"""Documents of Python's own standard library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_same_modules_every_time(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "tools" / "standard_library.py"
    outputs = []
    for name in ("one", "two"):
        subprocess.run([sys.executable, str(script), str(tmp_path / name)], check=True)
        outputs.append({p.name: p.read_text() for p in (tmp_path / name).iterdir()})
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 4
    assert all(9000 < len(text) <= 13000 for text in outputs[0].values())
