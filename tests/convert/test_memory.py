from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.torchrun import rank_environment
from tools.tiny_models import make_tiny_model

SCRIPT = """
import sys
from pathlib import Path
from megatron_longpo.cli import main

def memory(what):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024

for folder in sys.argv[1:]:
    before = memory("VmRSS")
    # Begins the peak anew.
    Path("/proc/self/clear_refs").write_text("5")
    assert main(["convert", "import", f"{folder}/hf", f"{folder}/megatron"]) == 0
    print("import", memory("VmHWM") - before)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    assert main(["convert", "export", f"{folder}/megatron", f"{folder}/out"]) == 0
    print("export", memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_converters_never_hold_the_model(tmp_path: Path) -> None:
    small = make_tiny_model("llama", tmp_path / "small" / "hf", tokenizer=False)
    large = make_tiny_model(
        "llama", tmp_path / "large" / "hf", layers=24, hidden=256, ffn=2048, tokenizer=False
    )
    done = subprocess.run(
        # The small one first: what is imported on the way is not the model.
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            SCRIPT,
            *(str(Path(f).parent) for f in (small, large)),
        ],
        capture_output=True,
        text=True,
        env=rank_environment(),
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    words = [line.split() for line in done.stdout.splitlines()]
    measured = [(word[0], int(word[1])) for word in words if word[0] in ("import", "export")]
    assert [name for name, _ in measured] == ["import", "export"] * 2
    model_bytes = sum(path.stat().st_size for path in Path(large).glob("*.safetensors"))
    assert model_bytes > 150 * 2**20
    for name, grown in measured[2:]:
        assert grown < model_bytes / 4, f"{name} took {grown:,} bytes for {model_bytes:,}"
