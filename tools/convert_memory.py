"""Measures the memory and time of the converters on a random model of a given size.

    python -m tools.convert_memory /scratch/converters --layers 28 --hidden 1536

The defaults are the shape of Qwen2.5-1.5B in bf16, 3.1 GB. Makes the model and its conversions in
a new folder, which it deletes. Memory is the peak resident set of the whole process, files that it
has mapped included; `import torch, megatron, transformers` alone is the first line.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from tools.tiny_models import FAMILIES, make_tiny_model

BASELINE = "import torch, transformers, megatron.core.models.gpt.gpt_model"
SHOW_PEAK = """
{body}
# Not getrusage's: that starts from the peak of the process that started this one.
(line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(int(line.split()[1]) * 1024)
"""


def measure(body: str) -> tuple[float, float]:
    """Runs Python code in a process of its own; returns its peak memory in GB and its seconds."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SHOW_PEAK.format(body=body)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds = time.monotonic() - started
    return int(done.stdout.splitlines()[-1]) / 1e9, seconds


def command(*arguments: str | Path) -> str:
    words = [str(argument) for argument in arguments]
    return f"from megatron_longpo.cli import main\nassert main({words!r}) == 0"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--family", choices=FAMILIES, default="qwen2")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--ffn", type=int, default=8960)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv_heads", type=int, default=2)
    parser.add_argument("--vocab_size", type=int, default=151936)
    parser.add_argument("--untied", action="store_true")
    arguments = vars(parser.parse_args())
    folder = arguments.pop("folder")
    tied = not arguments.pop("untied")
    folder.mkdir(parents=True)
    try:
        hf, megatron, out = folder / "hf", folder / "megatron", folder / "out"
        make_tiny_model(folder=hf, tied=tied, dtype=torch.bfloat16, **arguments)
        size = sum(path.stat().st_size for path in hf.glob("*.safetensors"))
        print(f"model: {size / 1e9:.2f} GB on disk")
        for name, body in (
            ("imports alone", BASELINE),
            ("convert import", command("convert", "import", hf, megatron)),
            ("convert export", command("convert", "export", megatron, out)),
            ("verify without logits", command("convert", "verify", hf, "--logits=false")),
            ("verify", command("convert", "verify", hf)),
        ):
            peak, seconds = measure(body)
            print(f"{name}: {peak:.2f} GB at most, {seconds:.0f} s", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
