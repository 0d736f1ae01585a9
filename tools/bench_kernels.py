"""Times every attention kernel of this machine on the blocks that prefix trees are made of.

    python -m tools.bench_kernels --lengths 32768 131072 --json outputs/kernels.json

For each length a causal block, and a branch of 1,024 tokens that attends all of it. TFLOP/s count
4 (forward) and 14 (forward and backward) x pairs x heads x head size, as is usual for kernels.
*First* is the first call of a new length: it includes compiling a plan, for kernels that have one.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import torch

from megatron_longpo.model.attention.kernel_choice import choose_kernel
from megatron_longpo.model.attention.kernels import AttentionKernel
from megatron_longpo.runtime.gpu_memory import allow_expandable_segments
from tools.bench_bare import (
    KERNELS,
    BlockShape,
    Timer,
    attention_seconds,
    available_kernels,
    fastest,
    num_attended,
)
from tools.bench_models import SHAPES, ModelShape

BRANCH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument(
        "--kernels", nargs="+", default=(*KERNELS, "cudnn+te"), help="time only these"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    allow_expandable_segments()
    shape = SHAPES[arguments.shape]
    has_cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if has_cuda else torch.device("cpu")
    dtype = torch.bfloat16 if has_cuda else torch.float32
    head_dim = shape.hidden // shape.heads
    print(choose_kernel("auto", device=device, dtype=dtype, head_dim=head_dim).line)
    kernels = available_kernels(head_dim, device=device, dtype=dtype, names=arguments.kernels)
    rows = []
    for length in arguments.lengths:
        for block in ((length, length, True), (BRANCH, length, False)):
            for name, kernel in kernels.items():
                row = measure(name, kernel, block, shape, device=device, dtype=dtype)
                rows.append(row)
                print(", ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def measure(
    name: str,
    kernel: AttentionKernel,
    block: BlockShape,
    shape: ModelShape,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Returns one row of the table, times in milliseconds."""
    queries, keys, causal = block
    head_dim = shape.hidden // shape.heads

    def seconds(block: BlockShape, timer: Timer) -> tuple[float, float]:
        return attention_seconds(
            kernel,
            block,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=head_dim,
            device=device,
            dtype=dtype,
            timer=timer,
        )

    forward, both = seconds(block, fastest)
    # A length that no plan is there for; of its calls, one each is what it costs to be new.
    started = time.perf_counter()
    seconds((queries - 8, keys - 8, causal), functools.partial(fastest, repeats=0))
    first = time.perf_counter() - started - forward - both
    work = num_attended(block) * shape.heads * head_dim / 1e12
    return {
        "kernel": name,
        "queries": queries,
        "keys": keys,
        "forward_ms": 1e3 * forward,
        "both_ms": 1e3 * both,
        "forward_tflops": 4 * work / forward,
        "both_tflops": 14 * work / both,
        "first_ms": 1e3 * first,
    }


def _shown(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
