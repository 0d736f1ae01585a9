"""Times one training step with the prefix shared and without, in one run.

    python tools/bench_step.py
    python tools/bench_step.py --document 8192 --reference online --json outputs/bench.json

Random weights, one pair of LongPO's shape a step: a long document, two answers. Both layouts go
through the code of `longpo train`, take turns step by step, and are compared by their medians.
The bare matrix products and attention calls of the shared step, timed in the same run, stand
beside it as the limit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_longpo.config import (
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ReferenceConfig,
    RunConfig,
    TrainConfig,
    resolve,
)
from megatron_longpo.data.rows import IGNORED_LABEL, PreferenceRow, TokenRow, write_rows_jsonl
from megatron_longpo.model.architectures import Architecture
from megatron_longpo.parallel import groups
from megatron_longpo.training.flops import step_flops
from megatron_longpo.training.loop import Run, prepare, train_step


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: prepare(settings(arguments, Path(folder), share_prefix=share_prefix))
            for name, share_prefix in (("unshared", False), ("shared", True))
        }
        seconds = time_steps(runs, warmup=arguments.warmup, repeats=arguments.repeats)
        report = summarise(arguments, runs, seconds)
    print_report(report)
    if arguments.json:
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    groups.shutdown()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=704, help="MLP size")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--document", type=int, default=4096, help="tokens before the answers")
    parser.add_argument("--answer", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of the short chunk")
    parser.add_argument("--reference", choices=("none", "online"), default="none")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--warmup", type=int, default=1, help="steps that are not counted")
    parser.add_argument("--repeats", type=int, default=5, help="counted steps of each layout")
    parser.add_argument("--json", help="file to write the numbers to")
    return parser.parse_args()


def settings(arguments: argparse.Namespace, folder: Path, *, share_prefix: bool) -> TrainConfig:
    """Settings of one layout; model and row are made on the first call."""
    model, rows = folder / "model", folder / "rows.jsonl"
    if not model.exists():
        config = LlamaConfig(
            vocab_size=arguments.vocabulary,
            hidden_size=arguments.hidden,
            intermediate_size=arguments.ffn,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.heads,
            num_key_value_heads=arguments.kv_heads,
            max_position_embeddings=2 * arguments.document,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(model)
        write_rows_jsonl(rows, [random_pair(arguments)])
    return resolve(
        TrainConfig(
            model=ModelConfig(hf_path=str(model), dtype=arguments.dtype),
            reference=ReferenceConfig(mode=arguments.reference),
            data=DataConfig(
                path=str(rows), max_length=2 * arguments.document, share_prefix=share_prefix
            ),
            optimizer=OptimizerConfig(warmup_ratio=0.0),
            train=RunConfig(
                global_batch_pairs=1,
                steps=arguments.warmup + arguments.repeats,
                recompute=arguments.recompute,
            ),
            logging=LoggingConfig(dir=str(folder / "run")),
        )
    )


def random_pair(arguments: argparse.Namespace) -> PreferenceRow:
    """A pair of LongPO's shape: one document, and the answers of one question."""
    rng = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(0, arguments.vocabulary, count)

    def row(prompt: np.ndarray, answer: np.ndarray) -> TokenRow:
        unlabelled = np.full(len(prompt), IGNORED_LABEL)
        return TokenRow(
            input_ids=np.concatenate([prompt, answer]), labels=np.concatenate([unlabelled, answer])
        )

    document, chunk = tokens(arguments.document), tokens(arguments.chunk)
    chosen, rejected = tokens(arguments.answer), tokens(arguments.answer)
    return PreferenceRow(
        id="bench",
        source="bench",
        chosen=row(document, chosen),
        rejected=row(document, rejected),
        reference_chosen=(row(chunk, chosen),),
        reference_rejected=(row(chunk, rejected),),
    )


def time_steps(runs: dict[str, Run], *, warmup: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each counted step; the layouts take turns, so that both meet the same noise."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(warmup + repeats):
        for name, run in runs.items():
            step_time = train_step(run)["step_time_s"]
            assert step_time is not None
            if index >= warmup:
                seconds[name].append(step_time)
    return seconds


def summarise(
    arguments: argparse.Namespace, runs: dict[str, Run], seconds: dict[str, list[float]]
) -> dict[str, Any]:
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    limits = {name: bare_seconds(run) for name, run in runs.items()}
    layouts = {}
    for name, run in runs.items():
        sizes = run.pairs.sizes
        flops = step_flops(sizes, run.sources.policy, run.sources.reference)
        layouts[name] = {
            "policy_tokens": sum(size.policy_tokens for size in sizes),
            "median_step_s": medians[name],
            "step_s": seconds[name],
            "model_tflops": flops / medians[name] / 1e12,
            "bare_s": limits[name],
            "efficiency": sum(limits[name].values()) / medians[name],
        }
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "settings": vars(arguments),
        "layouts": layouts,
        "speedup": medians["unshared"] / medians["shared"],
    }


def bare_seconds(run: Run) -> dict[str, float]:
    """Seconds of the policy's matrix products and attention alone, forward and backward."""
    arch = run.sources.policy
    size = run.pairs.sizes[0]
    device, dtype = run.groups.device, next(run.model[0].parameters()).dtype
    rows = [(size.policy_tokens, 1)]
    if size.policy_tokens == size.unshared_tokens:
        rows = [(size.policy_tokens // 2, 2)]
    products = sum(
        bare_matmul(size.policy_tokens, width_in, width_out, device=device, dtype=dtype)
        for width_in, width_out in linear_shapes(arch)
    )
    head = bare_matmul(
        size.policy_edges, arch.hidden_size, arch.vocab_size, device=device, dtype=dtype
    )
    attention = sum(
        count * bare_attention(arch, length, device=device, dtype=dtype) for length, count in rows
    )
    return {
        "linears": arch.num_layers * products,
        "attention": arch.num_layers * attention,
        "head": head,
    }


def linear_shapes(arch: Architecture) -> list[tuple[int, int]]:
    """(in, out) of one layer's matrices."""
    width, kv_width = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    return [
        (arch.hidden_size, width + 2 * kv_width),
        (width, arch.hidden_size),
        (arch.hidden_size, 2 * arch.ffn_hidden_size),
        (arch.ffn_hidden_size, arch.hidden_size),
    ]


def bare_matmul(
    tokens: int, width_in: int, width_out: int, *, device: torch.device, dtype: torch.dtype
) -> float:
    """Seconds of the three products of a linear layer: forward, input and weight gradient."""
    states = torch.randn(tokens, width_in, device=device, dtype=dtype)
    weight = torch.randn(width_out, width_in, device=device, dtype=dtype)
    gradient = torch.randn(tokens, width_out, device=device, dtype=dtype)
    return fastest(lambda: (states @ weight.T, gradient @ weight, gradient.T @ states))


def bare_attention(
    arch: Architecture, tokens: int, *, device: torch.device, dtype: torch.dtype
) -> float:
    """Seconds of one causal attention call over one row, forward and backward."""
    query, key, value = (
        torch.randn(1, heads, tokens, arch.head_dim, device=device, dtype=dtype, requires_grad=True)
        for heads in (arch.num_heads, arch.num_kv_heads, arch.num_kv_heads)
    )

    def call() -> None:
        output = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=arch.num_heads != arch.num_kv_heads
        )
        torch.autograd.grad(output, (query, key, value), torch.ones_like(output))

    return fastest(call)


def fastest(call: Any, *, repeats: int = 3) -> float:
    """The best time of a bare call is the limit."""
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "CPU"


def print_report(report: dict[str, Any]) -> None:
    print(f"{report['device']}, {report['threads']} threads, torch {report['torch']}")
    for name, layout in report["layouts"].items():
        bare = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in layout["bare_s"].items())
        print(
            f"{name:>9}: {layout['policy_tokens']} tokens, median {layout['median_step_s']:.2f} s, "
            f"efficiency {layout['efficiency']:.2f} (bare: {bare})"
        )
    print(f"sharing the prefix is {report['speedup']:.2f} times as fast")


if __name__ == "__main__":
    main()
