"""Times training steps on random weights: how fast, how near the limit, and where the time goes.

    python -m tools.bench_step
    python -m tools.bench_step --shape mistral-7b --layers 8 --context 32768 --dtype bf16
    torchrun --nproc-per-node 2 -m tools.bench_step --shape mistral-7b --dtype bf16 \\
        --context 131072 --tensor 2 --recompute selective --json outputs/bench.json

One pair of LongPO's shape a step: a long document, two turns. All modes train the same model in
the same run, take turns step by step, and are compared by their medians. *Efficiency* is the time
of the step's bare matrix products and attention calls (tools/bench_bare.py) over the step's; on a
GPU it is given for single calls, at the full clock, and for calls that go on like a step does, at
the clock that the power limit leaves.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from torch.profiler import record_function

from megatron_longpo.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ReferenceConfig,
    RunConfig,
    TrainConfig,
    resolve,
)
from megatron_longpo.data.rows import write_rows_jsonl
from megatron_longpo.data.sampler import PairSampler
from megatron_longpo.gpu_memory import allow_expandable_segments
from megatron_longpo.model.spec import DTYPES, Recompute
from megatron_longpo.parallel import groups
from megatron_longpo.training.batches import rank_packs
from megatron_longpo.training.flops import step_flops
from megatron_longpo.training.loop import Run, prepare, train_step
from megatron_longpo.training.sources import make_objective, read_pairs
from tools.bench_bare import Timer, bare_seconds, fastest, sustained
from tools.bench_models import SHAPES, PairShape, random_pair, write_random_weights
from tools.bench_trace import breakdown, in_range, traced_step


@dataclass(frozen=True, kw_only=True, slots=True)
class Mode:
    """One way of doing the same step."""

    share_prefix: bool
    reference: str

    @property
    def name(self) -> str:
        layout = "shared" if self.share_prefix else "unshared"
        return f"{layout}, reference {self.reference}"


def main() -> None:
    allow_expandable_segments()
    bench(parse_arguments())
    groups.shutdown()


def bench(arguments: argparse.Namespace) -> None:
    """Measures, prints and saves."""
    torch.manual_seed(0)
    modes = [
        Mode(share_prefix=layout == "shared", reference=reference)
        for reference, layout in product(arguments.reference, arguments.layout)
    ]
    with tempfile.TemporaryDirectory() as folder:
        runs = make_runs(arguments, modes, Path(folder))
        timings = time_steps(runs, warmup=arguments.warmup, repeats=arguments.repeats)
        parts = {
            mode: profile_step(run, mode, arguments, Path(folder)) for mode, run in runs.items()
        }
        report = summarise(arguments, runs, timings, parts)
    if next(iter(runs.values())).groups.is_main:
        print_report(report)
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_argument_group("model")
    model.add_argument("--shape", choices=SHAPES, default="small")
    for name in ("layers", "hidden", "ffn", "heads", "kv-heads", "vocabulary"):
        model.add_argument(f"--{name}", type=int, help="replaces the shape's")
    model.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    model.add_argument("--kernel", default="auto", help="model.attention_kernel")
    model.add_argument("--model-layers", default="auto", help="model.layers")
    pair = parser.add_argument_group("pair")
    pair.add_argument("--context", type=int, default=4224, help="tokens of the longest row")
    pair.add_argument("--turns", type=int, default=2)
    pair.add_argument(
        "--answer", type=int, help="mean tokens; default 350, less in a short context"
    )
    pair.add_argument("--chunk", type=int, help="tokens; default 24K, an eighth of short contexts")
    modes = parser.add_argument_group("modes, all in this run")
    modes.add_argument(
        "--layout", nargs="+", choices=("shared", "unshared"), default=["unshared", "shared"]
    )
    modes.add_argument("--reference", nargs="+", choices=("none", "online"), default=["none"])
    layout = parser.add_argument_group("layout, under torchrun")
    for name in ("tensor", "pipeline", "context-parallel"):
        layout.add_argument(f"--{name}", type=int, default=1)
    layout.add_argument("--context-comm", choices=("a2a", "all_gather"), default="all_gather")
    run = parser.add_argument_group("run")
    run.add_argument("--recompute", choices=get_args(Recompute), default="none")
    run.add_argument("--grad-dtype", choices=("fp32", "bf16"), default="fp32")
    run.add_argument("--warmup", type=int, default=1, help="steps that are not counted")
    run.add_argument("--repeats", type=int, default=5, help="counted steps of each mode")
    run.add_argument("--profile", type=Path, help="folder for a trace of each mode's last step")
    run.add_argument("--json", type=Path, help="file to write the numbers to")
    arguments = parser.parse_args(argv)
    if arguments.answer is None:
        arguments.answer = min(350, max(1, arguments.context // 64))
    if arguments.chunk is None:
        arguments.chunk = min(24 * 1024, max(1, arguments.context // 8))
    return arguments


def make_runs(arguments: argparse.Namespace, modes: list[Mode], folder: Path) -> dict[Mode, Run]:
    """A run for each mode; all of them share the model and the optimizer."""
    shape = SHAPES[arguments.shape].changed(
        layers=arguments.layers,
        hidden=arguments.hidden,
        ffn=arguments.ffn,
        heads=arguments.heads,
        kv_heads=arguments.kv_heads,
        vocabulary=arguments.vocabulary,
    )
    pair_shape = PairShape(
        context=arguments.context,
        turns=arguments.turns,
        answer=arguments.answer,
        question=max(1, arguments.answer // 8),
        chunk=arguments.chunk,
    )
    shape.write_config(folder / "model", max_positions=2 * arguments.context)
    num_pairs = data_parallel_size(arguments)
    rows = [
        random_pair(pair_shape, vocabulary=shape.vocabulary, seed=seed) for seed in range(num_pairs)
    ]
    write_rows_jsonl(folder / "rows.jsonl", rows)
    # What is built must serve every mode.
    largest = max(modes, key=lambda mode: mode.reference == "online")
    built = prepare(settings(arguments, folder, largest), write_weights=write_random_weights)
    optimizer: Any = built.optimizer
    optimizer.step = in_range("optimizer", optimizer.step)
    for chunk in built.model:
        mark_reference(chunk)
    return {mode: as_mode(built, settings(arguments, folder, mode)) for mode in modes}


def data_parallel_size(arguments: argparse.Namespace) -> int:
    model_ranks = arguments.tensor * arguments.pipeline * arguments.context_parallel
    return max(1, int(os.environ.get("WORLD_SIZE", 1)) // model_ranks)


def settings(arguments: argparse.Namespace, folder: Path, mode: Mode) -> TrainConfig:
    """Settings of one mode; a data-parallel rank gets one pair a step."""
    return resolve(
        TrainConfig(
            model=ModelConfig(
                hf_path=str(folder / "model"),
                dtype=arguments.dtype,
                attention_kernel=arguments.kernel,
                layers=arguments.model_layers,
            ),
            reference=ReferenceConfig(mode=mode.reference),  # type: ignore[arg-type]
            data=DataConfig(
                path=str(folder / "rows.jsonl"),
                max_length=2 * arguments.context,
                share_prefix=mode.share_prefix,
            ),
            parallel=ParallelConfig(
                tensor=arguments.tensor,
                pipeline=arguments.pipeline,
                context=arguments.context_parallel,
                context_comm=arguments.context_comm,
            ),
            optimizer=OptimizerConfig(warmup_ratio=0.0, grad_dtype=arguments.grad_dtype),
            train=RunConfig(
                global_batch_pairs=data_parallel_size(arguments),
                steps=arguments.warmup + arguments.repeats + 1,
                recompute=arguments.recompute,
            ),
            checkpoint=CheckpointConfig(interval=0),
            logging=LoggingConfig(dir=str(folder / "run"), tensorboard=False),
        )
    )


def as_mode(built: Run, config: TrainConfig) -> Run:
    """The same model and optimizer on the pairs as another mode reads them."""
    sources = built.sources
    if config.reference.mode == "none":
        sources = replace(sources, reference=None, reference_folder=None)
    objective = make_objective(config)
    pairs = read_pairs(config, config.data.path, sources, objective, progress=lambda rows: rows)
    sampler = PairSampler(
        len(pairs),
        global_batch_pairs=config.train.global_batch_pairs,
        shuffle=False,
        seed=config.data.seed,
        fingerprint=pairs.dataset.fingerprint,
    )
    return replace(
        built, config=config, sources=sources, objective=objective, pairs=pairs, sampler=sampler
    )


def mark_reference(wrapped: Any) -> None:
    """Shows the reference's layers as a range of the trace."""
    while hasattr(wrapped, "module"):
        wrapped = wrapped.module
    if wrapped.reference is None:
        return
    opened: list[record_function] = []

    def enter(*_: Any) -> None:
        opened.append(record_function("reference"))
        opened[-1].__enter__()

    def leave(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    wrapped.reference.decoder.register_forward_pre_hook(enter)
    wrapped.reference.decoder.register_forward_hook(leave)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """One counted step."""

    seconds: float
    peak_memory_gib: float | None
    """None without a GPU, where a process's peak never falls from mode to mode."""


def time_steps(runs: dict[Mode, Run], *, warmup: int, repeats: int) -> dict[Mode, list[Timing]]:
    """The modes take turns, so that all of them meet the same noise."""
    timings: dict[Mode, list[Timing]] = {mode: [] for mode in runs}
    for index in range(warmup + repeats):
        for mode, run in runs.items():
            timing = timed_step(run)
            if index >= warmup:
                timings[mode].append(timing)
    return timings


def timed_step(run: Run) -> Timing:
    """From an idle GPU to an idle GPU: the optimizer's last kernels belong to their step."""
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    train_step(run)
    if has_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**30 if has_cuda else None
    return Timing(seconds=seconds, peak_memory_gib=peak)


def profile_step(
    run: Run, mode: Mode, arguments: argparse.Namespace, folder: Path
) -> dict[str, float]:
    """One more step under the profiler, which slows it a little: seconds by part."""
    name = mode.name.replace(", ", "-").replace(" ", "-")
    path = (arguments.profile or folder) / f"{name}-rank{run.groups.rank}.json"
    with traced_step(path):
        train_step(run)
    return breakdown(path)


def summarise(
    arguments: argparse.Namespace,
    runs: dict[Mode, Run],
    timings: dict[Mode, list[Timing]],
    parts: dict[Mode, dict[str, float]],
) -> dict[str, Any]:
    """Everything that is printed, as plain JSON types."""
    modes: dict[str, dict[str, Any]] = {}
    for mode, run in runs.items():
        sizes = run.pairs.sizes
        seconds = statistics.median(timing.seconds for timing in timings[mode])
        flops = step_flops(sizes, run.sources.policy, run.sources.reference)
        peaks = [t.peak_memory_gib for t in timings[mode] if t.peak_memory_gib is not None]
        bare = bare_step(run, fastest)
        steady = bare_step(run, sustained) if torch.cuda.is_available() else None
        modes[mode.name] = {
            "policy_tokens": sum(size.policy_tokens for size in sizes),
            "reference_tokens": sum(size.reference_tokens for size in sizes),
            "median_step_s": seconds,
            "step_s": [timing.seconds for timing in timings[mode]],
            "model_tflops_per_gpu": flops / seconds / run.groups.world_size / 1e12,
            "peak_memory_gib": max(peaks, default=None),
            "bare_s": bare,
            "efficiency": sum(bare.values()) / seconds,
            "sustained_s": steady,
            "sustained_efficiency": None if steady is None else sum(steady.values()) / seconds,
            "breakdown_s": parts[mode],
        }
    return {
        "device": device_name(),
        "world_size": next(iter(runs.values())).groups.world_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "settings": {name: _plain(value) for name, value in vars(arguments).items()},
        "modes": modes,
        "speedup": speedups(arguments.reference, modes),
    }


def speedups(references: list[str], modes: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How much faster the shared layout is, by reference, where both layouts ran."""
    found = {}
    for reference in references:
        shared, unshared = (
            modes.get(Mode(share_prefix=share, reference=reference).name) for share in (True, False)
        )
        if shared is not None and unshared is not None:
            found[reference] = unshared["median_step_s"] / shared["median_step_s"]
    return found


def bare_step(run: Run, timer: Timer) -> dict[str, float]:
    """Bare seconds by part of this rank's microbatches."""
    packs = rank_packs(
        run.pairs,
        list(range(len(run.pairs))),
        run.groups,
        budget_tokens=run.budget_tokens,
    )
    sizes = run.groups.sizes
    heads_shared = sizes.context_inner
    total: dict[str, float] = {}
    for pack in packs:
        parts = bare_seconds(
            pack,
            run.sources.policy,
            run.sources.reference,
            device=run.groups.device,
            dtype=DTYPES[run.config.model.dtype],
            tensor=sizes.tensor,
            pipeline=sizes.pipeline,
            attention_ranks=sizes.tensor * heads_shared,
            timer=timer,
        )
        for part, seconds in parts.items():
            total[part] = total.get(part, 0.0) + seconds
    return total


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "CPU"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def print_report(report: dict[str, Any]) -> None:
    print(f"{report['world_size']} x {report['device']}, torch {report['torch']}")
    for name, mode in report["modes"].items():
        memory, steady = mode["peak_memory_gib"], mode["sustained_efficiency"]
        print(
            f"{name}: {mode['policy_tokens']} + {mode['reference_tokens']} tokens, "
            f"median {mode['median_step_s']:.3f} s, "
            f"{mode['model_tflops_per_gpu']:.0f} model TFLOP/s a GPU, "
            f"efficiency {mode['efficiency']:.3f}"
            + (f" ({steady:.3f} sustained)" if steady is not None else "")
            + (f", peak {memory:.1f} GiB" if memory is not None else "")
        )
        titles = {"bare": "bare_s", "sustained": "sustained_s", "step": "breakdown_s"}
        for title, parts in ((title, mode[key]) for title, key in titles.items() if mode[key]):
            shown = ", ".join(f"{part} {seconds:.3f}" for part, seconds in parts.items())
            print(f"    {title}: {shown}")
    for reference, speedup in report["speedup"].items():
        print(f"sharing the prefix is {speedup:.2f} times as fast (reference {reference})")


if __name__ == "__main__":
    main()
