"""Times the log-prob head against its limit and against liger's kernel, and measures its memory.

    python -m tools.bench_head --json outputs/head.json

The limit is three bare matrix products of the same shape, of which ours computes four: logits are
computed again in backward. Memory is what is used beyond inputs, weight and the two gradients.
liger's cross entropy takes all logits at once, so it is timed with the products around it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_longpo.model.head.logprobs import VocabularyShard, edge_logps
from megatron_longpo.parallel import groups
from megatron_longpo.runtime.gpu_memory import allow_expandable_segments
from tools.bench_bare import LARGEST_PRODUCT, bare_matmul, fastest

SHAPES = ((4096, 32000), (3584, 152064))
"""(hidden size, vocabulary): Mistral-7B, Qwen2.5-7B."""
LIMITS_GIB = {32000: 2.0, 152064: 4.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadInputs:
    """Letters: e edges and tokens, h hidden size, v vocabulary."""

    hidden: Tensor
    """[e,h], requires grad."""
    weight: Tensor
    """[v,h], requires grad."""
    sources: Tensor
    """[e], every token once: the NLL of a whole row."""
    targets: Tensor
    """[e]."""
    grads: Tensor
    """[e] fp32."""

    @property
    def gradient_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.hidden, self.weight))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--edges", type=int, default=131072)
    parser.add_argument(
        "--shape", type=int, nargs=2, action="append", metavar=("HIDDEN", "VOCABULARY")
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    allow_expandable_segments()
    one = groups.initialize(groups.ParallelSizes())
    dtype = torch.bfloat16 if one.device.type == "cuda" else torch.float32
    report = []
    for hidden_size, vocabulary in arguments.shape or SHAPES:
        row = measure(arguments.edges, hidden_size, vocabulary, groups_of_one=one, dtype=dtype)
        report.append(row)
        print(", ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    groups.shutdown()


def measure(
    edges: int,
    hidden_size: int,
    vocabulary: int,
    *,
    groups_of_one: groups.Groups,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Returns one row of the table, times in milliseconds."""
    device = groups_of_one.device
    timed = min(edges, LARGEST_PRODUCT)
    bare = bare_matmul(timed, hidden_size, vocabulary, device=device, dtype=dtype) * edges / timed
    inputs = random_inputs(edges, hidden_size, vocabulary, device=device, dtype=dtype)
    shard = VocabularyShard.of_rank(
        rows=vocabulary, vocab_size=vocabulary, group=groups_of_one.tensor
    )

    def ours() -> None:
        logps = edge_logps(inputs.hidden, inputs.weight, inputs.sources, inputs.targets, shard)
        torch.autograd.grad(logps, (inputs.hidden, inputs.weight), inputs.grads)

    seconds, extra = timed_with_memory(ours, inputs)
    row: dict[str, Any] = {
        "edges": edges,
        "hidden": hidden_size,
        "vocabulary": vocabulary,
        "three_products_ms": 1e3 * bare,
        "ours_ms": 1e3 * seconds,
        "ours_over_products": seconds / bare,
        "ours_extra_gib": extra,
        "limit_gib": LIMITS_GIB.get(vocabulary),
    }
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        liger = liger_call(inputs, groups_of_one)
        try:
            seconds, extra = timed_with_memory(liger, inputs)
            row |= {"liger_ms": 1e3 * seconds, "liger_extra_gib": extra}
        except torch.OutOfMemoryError:
            row |= {"liger_ms": "out of memory"}
    return row


def random_inputs(
    edges: int, hidden_size: int, vocabulary: int, *, device: torch.device, dtype: torch.dtype
) -> HeadInputs:
    hidden = torch.randn(edges, hidden_size, device=device, dtype=dtype).requires_grad_()
    weight = 0.02 * torch.randn(vocabulary, hidden_size, device=device, dtype=dtype)
    return HeadInputs(
        hidden=hidden,
        weight=weight.requires_grad_(),
        sources=torch.arange(edges, device=device),
        targets=torch.randint(0, vocabulary, (edges,), device=device),
        grads=torch.randn(edges, device=device),
    )


def liger_call(inputs: HeadInputs, one: groups.Groups) -> Callable[[], None]:
    """Returns a call of liger's vocabulary-parallel cross entropy behind a plain linear layer."""
    from liger_kernel.megatron.cross_entropy import LigerMegatronCrossEntropy

    cross_entropy = LigerMegatronCrossEntropy()

    def call() -> None:
        logits = (inputs.hidden @ inputs.weight.T).unsqueeze(1)
        losses = cross_entropy(logits, inputs.targets.unsqueeze(1), tp_group=one.tensor)
        torch.autograd.grad(
            losses.squeeze(1), (inputs.hidden, inputs.weight), inputs.grads.to(losses.dtype)
        )

    return call


def timed_with_memory(call: Callable[[], None], inputs: HeadInputs) -> tuple[float, float | None]:
    """Returns seconds, and GiB beyond inputs and gradients; a first call only compiles."""
    if not inputs.hidden.is_cuda:
        return fastest(call), None
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - inputs.gradient_bytes
    return fastest(call), extra / 2**30


def _shown(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
