"""Times training steps on random weights: how fast, how near the limit, and where the time goes.

    python -m tools.bench_step
    python -m tools.bench_step --shape mistral-7b --layers 8 --context 32768 --dtype bf16
    torchrun --nproc-per-node 2 -m tools.bench_step --shape mistral-7b --dtype bf16 \\
        --context 131072 --tensor 2 --recompute selective --json outputs/bench.json

One pair of LongPO's shape a step (`--pairs` of them under a pipeline): a long document, two turns.
All modes train the same model in the same run, take turns step by step, and are compared by their
medians. Lines with the elapsed time say how far it is, and `--json` has what is known so far.
*Efficiency* is the time of the step's bare matrix products and attention calls
(tools/bench_bare.py) over the step's; on a GPU it is given for single calls, at the full clock, and
for calls that go on like a step does, at the clock that the power limit leaves.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from megatron_longpo.config.names import Recompute
from megatron_longpo.config.train import (
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
from megatron_longpo.data.rows.writing import write_rows_jsonl
from megatron_longpo.data.trees.sampler import PairSampler
from megatron_longpo.engine.batches import rank_packs
from megatron_longpo.engine.sources import make_objective, read_pairs
from megatron_longpo.model.spec import DTYPES
from megatron_longpo.parallel import groups
from megatron_longpo.runtime.gpu_memory import allow_expandable_segments
from megatron_longpo.training.loop import Run, prepare
from tools.bench_bare import Limit, Timer, fastest, sustained
from tools.bench_models import SHAPES, PairShape, random_pair, write_random_weights
from tools.bench_report import Report
from tools.bench_timing import mark_parts, profiled_step, time_steps


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
    """Measures, prints progress, saves what is known, and prints everything at the end."""
    torch.manual_seed(0)
    modes = [
        Mode(share_prefix=layout == "shared", reference=reference)
        for reference, layout in product(arguments.reference, arguments.layout)
    ]
    with tempfile.TemporaryDirectory() as folder:
        runs = make_runs(arguments, modes, Path(folder))
        first = next(iter(runs.values()))
        report = Report(arguments, is_main=first.groups.is_main, world_size=first.groups.world_size)
        for name, run in runs.items():
            report.start_mode(name, run)
        report.say("model, optimizer and rows are there")
        names = {id(run): name for name, run in runs.items()}
        time_steps(
            runs.values(),
            warmup=arguments.warmup,
            repeats=arguments.repeats,
            done=lambda run, timing, counts: report.add_step(
                names[id(run)], run, timing, counts=counts
            ),
        )
        if arguments.breakdown:
            for name, run in runs.items():
                trace = f"{name.replace(', ', '-').replace(' ', '-')}-rank{run.groups.rank}.json"
                path = (arguments.profile or Path(folder)) / trace
                report.add_breakdown(name, profiled_step(run, path))
        limit = limit_of(first)
        for name, run in runs.items():
            report.add_bare(name, "bare", bare_step(run, limit, fastest))
            if torch.cuda.is_available():
                report.add_bare(name, "sustained", bare_step(run, limit, sustained))
    report.print()


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return with_defaults(make_parser(__doc__).parse_args(argv))


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
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
    pair.add_argument(
        "--shortest", type=int, help="the pairs' contexts are spread evenly from here to --context"
    )
    pair.add_argument("--turns", type=int, default=2)
    pair.add_argument(
        "--pairs", type=int, default=1, help="microbatches a step, of one pair each, a data rank"
    )
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
    layout.add_argument("--virtual-pipeline", type=int, help="model chunks a stage")
    layout.add_argument("--pipeline-layout", help="parallel.pipeline_layout")
    layout.add_argument(
        "--context-comm", choices=("a2a", "all_gather", "a2a+all_gather"), default="all_gather"
    )
    layout.add_argument("--context-inner", type=int, help="parallel.context_inner")
    for name in ("grad-reduce", "param-gather"):
        layout.add_argument(f"--overlap-{name}", action="store_true")
    run = parser.add_argument_group("run")
    run.add_argument("--recompute", choices=get_args(Recompute), default="none")
    run.add_argument("--recompute-layers", type=int, help="train.recompute_layers")
    run.add_argument("--reference-offload", action="store_true", help="reference.offload")
    run.add_argument("--offload-activations", action="store_true")
    run.add_argument("--state-dtype", choices=("fp32", "bf16"), default="fp32")
    run.add_argument("--grad-dtype", choices=("fp32", "bf16"), default="fp32")
    run.add_argument("--warmup", type=int, default=1, help="steps that are not counted")
    run.add_argument("--repeats", type=int, default=5, help="counted steps of each mode")
    run.add_argument(
        "--no-breakdown", dest="breakdown", action="store_false", help="no step under the profiler"
    )
    run.add_argument("--profile", type=Path, help="folder for a trace of each mode's last step")
    run.add_argument("--json", type=Path, help="file to write the numbers to")
    return parser


def with_defaults(arguments: argparse.Namespace) -> argparse.Namespace:
    """Returns arguments with defaults that depend on others filled in."""
    if arguments.shortest is None:
        arguments.shortest = arguments.context
    if arguments.answer is None:
        arguments.answer = min(350, max(1, arguments.context // 64))
    if arguments.chunk is None:
        arguments.chunk = min(24 * 1024, max(1, arguments.context // 8))
    return arguments


def make_runs(arguments: argparse.Namespace, modes: list[Mode], folder: Path) -> dict[str, Run]:
    """Returns a run for each mode, by its name; all of them share the model and the optimizer."""
    shape = SHAPES[arguments.shape].changed(
        layers=arguments.layers,
        hidden=arguments.hidden,
        ffn=arguments.ffn,
        heads=arguments.heads,
        kv_heads=arguments.kv_heads,
        vocabulary=arguments.vocabulary,
    )
    shape.write_config(folder / "model", max_positions=2 * arguments.context)
    num_pairs = pairs_a_step(arguments)
    contexts = np.linspace(arguments.context, arguments.shortest, num_pairs, dtype=int)
    rows = [
        random_pair(
            PairShape(
                context=int(context),
                turns=arguments.turns,
                answer=arguments.answer,
                question=max(1, arguments.answer // 8),
                chunk=min(arguments.chunk, int(context) // 2),
            ),
            vocabulary=shape.vocabulary,
            seed=seed,
        )
        for seed, context in enumerate(contexts)
    ]
    write_rows_jsonl(folder / "rows.jsonl", rows)
    # What is built must serve every mode.
    largest = max(modes, key=lambda mode: mode.reference == "online")
    built = prepare(settings(arguments, folder, largest), write_weights=write_random_weights)
    mark_parts(built)
    return {mode.name: as_mode(built, settings(arguments, folder, mode)) for mode in modes}


def pairs_a_step(arguments: argparse.Namespace) -> int:
    """Returns the pairs of a step over all data-parallel ranks."""
    model_ranks = arguments.tensor * arguments.pipeline * arguments.context_parallel
    return arguments.pairs * max(1, int(os.environ.get("WORLD_SIZE", 1)) // model_ranks)


def settings(arguments: argparse.Namespace, folder: Path, mode: Mode) -> TrainConfig:
    """Returns the config values of one mode."""
    return resolve(
        TrainConfig(
            model=ModelConfig(
                hf_path=str(folder / "model"),
                dtype=arguments.dtype,
                attention_kernel=arguments.kernel,
                layers=arguments.model_layers,
            ),
            reference=ReferenceConfig(
                mode=mode.reference,  # type: ignore[arg-type]
                offload=arguments.reference_offload and mode.reference == "online",
            ),
            data=DataConfig(
                path=str(folder / "rows.jsonl"),
                max_length=2 * arguments.context,
                share_prefix=mode.share_prefix,
            ),
            parallel=ParallelConfig(
                tensor=arguments.tensor,
                pipeline=arguments.pipeline,
                virtual_pipeline=arguments.virtual_pipeline,
                pipeline_layout=arguments.pipeline_layout,
                context=arguments.context_parallel,
                context_comm=arguments.context_comm,
                context_inner=arguments.context_inner,
            ),
            optimizer=OptimizerConfig(
                lr_schedule="constant",
                warmup_ratio=0.0,
                grad_dtype=arguments.grad_dtype,
                state_dtype=arguments.state_dtype,
                overlap_grad_reduce=arguments.overlap_grad_reduce,
                overlap_param_gather=arguments.overlap_param_gather,
            ),
            train=RunConfig(
                global_batch_pairs=pairs_a_step(arguments),
                steps=arguments.warmup + arguments.repeats + 1,
                recompute=arguments.recompute,
                offload_activations=arguments.offload_activations,
                recompute_layers=arguments.recompute_layers,
            ),
            checkpoint=CheckpointConfig(interval=0),
            logging=LoggingConfig(dir=str(folder / "run"), tensorboard=False),
        )
    )


def as_mode(built: Run, config: TrainConfig) -> Run:
    """Returns a run with the same model and optimizer on the pairs as another mode reads them."""
    sources = built.sources
    if config.reference.mode == "none":
        sources = replace(sources, scorers=())
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


def limit_of(run: Run) -> Limit:
    """Returns what times bare calls, for all modes of this rank."""
    sizes = run.groups.sizes
    return Limit(
        head_dim=run.sources.policy.head_dim,
        device=run.groups.device,
        dtype=DTYPES[run.config.model.dtype],
        tensor=sizes.tensor,
        pipeline=sizes.pipeline,
        context_inner=sizes.context_inner,
    )


def bare_step(run: Run, limit: Limit, timer: Timer) -> dict[str, float]:
    """Returns bare seconds by part of this rank's microbatches."""
    packs = rank_packs(
        run.pairs, list(range(len(run.pairs))), run.groups, budget_tokens=run.budget_tokens
    )
    total: dict[str, float] = {}
    for pack in packs:
        parts = limit.seconds(pack, run.sources.policy, run.sources.online_arch, timer=timer)
        for part, seconds in parts.items():
            total[part] = total.get(part, 0.0) + seconds
    return total


if __name__ == "__main__":
    main()
