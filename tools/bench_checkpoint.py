"""Times saving and resuming a training run on random weights, in line and in the background.

    python -m tools.bench_checkpoint --folder outputs/checkpoints
    torchrun --nproc-per-node 4 -m tools.bench_checkpoint --shape mistral-7b --dtype bf16 \\
        --context 131072 --tensor 4 --recompute all_but_attention --folder /scratch/checkpoints

It takes plain steps, saves in line, saves in the background while it trains on, and then loads that
checkpoint and takes the same steps again: their losses must be the same. The model and layout
arguments are those of tools.bench_step. Both checkpoints are deleted at the end.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from checkpoints_convert.torch_dist import iteration_folder
from megatron_longpo.data.jsonl import write_whole
from megatron_longpo.parallel import groups
from megatron_longpo.runtime.gpu_memory import allow_expandable_segments
from megatron_longpo.training import checkpoint, loop
from megatron_longpo.training.loop import Run, train_step
from tools import bench_step
from tools.bench_report import device_name

T = TypeVar("T")

IN_LINE, BACKGROUND = "in_line", "background"
"""Folders of the two checkpoints, which are deleted at the end."""


def main() -> None:
    parser = bench_step.make_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are written")
    arguments = bench_step.with_defaults(parser.parse_args())
    allow_expandable_segments()
    torch.manual_seed(0)
    try:
        with tempfile.TemporaryDirectory() as inputs:
            mode = bench_step.Mode(share_prefix=True, reference=arguments.reference[0])
            (run,) = bench_step.make_runs(arguments, [mode], Path(inputs)).values()
            report = bench(run, arguments.folder, warmup=arguments.warmup, steps=arguments.repeats)
    finally:
        # Not the folder itself: it is the user's, and may have had something in it.
        for name in (IN_LINE, BACKGROUND):
            shutil.rmtree(arguments.folder / name, ignore_errors=True)
    if run.groups.is_main:
        print_report(report)
        if arguments.json is not None:
            write_whole(arguments.json, json.dumps(report, indent=2) + "\n")
    groups.shutdown()


def bench(run: Run, folder: Path, *, warmup: int, steps: int) -> dict[str, Any]:
    """Returns the numbers of one run as JSON types; seconds are this rank's, between barriers."""
    for _ in range(warmup):
        train_step(run)
    plain = [timed(lambda: train_step(run))[0] for _ in range(steps)]
    in_line, _ = timed(lambda: save(run, folder / IN_LINE, in_background=False))
    background = folder / BACKGROUND
    stall, _ = timed(lambda: save(run, background, in_background=True))
    started, saved_step = time.perf_counter(), run.step
    beside, losses = [], []
    written: float | None = None
    for _ in range(steps):
        seconds, metrics = timed(lambda: train_step(run))
        losses.append(metrics["loss"])
        if written is not None:
            continue
        beside.append(seconds)
        run.saves.poll()
        if checkpoint.newest(background) is not None:
            written = time.perf_counter() - started
    waited, _ = timed(run.saves.wait)
    written = written or time.perf_counter() - started
    resumed, _ = timed(
        lambda: checkpoint.load(
            iteration_folder(background, saved_step), run.state, load_optimizer=True
        )
    )
    run.step = saved_step
    again = [train_step(run)["loss"] for _ in range(steps)]
    median = statistics.median(plain)
    return {
        "device": device_name(),
        "world_size": run.groups.world_size,
        "bytes": sum(path.stat().st_size for path in background.rglob("*") if path.is_file()),
        "plain_step_s": plain,
        "in_line_s": in_line,
        "background": {
            "stall_s": stall,
            "written_s": written,
            "waited_at_the_end_s": waited,
            "steps_beside_s": beside,
            "cost_a_step": statistics.median(beside) / median - 1,
        },
        "resume_s": resumed,
        "losses": losses,
        "losses_resumed": again,
        "same_losses": losses == again,
    }


def save(run: Run, folder: Path, *, in_background: bool) -> None:
    """Saves as training does, to a folder of its own."""
    settings = replace(run.config.checkpoint, dir=str(folder), keep=1, async_save=in_background)
    loop.save(replace(run, config=replace(run.config, checkpoint=settings)), is_final=False)


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """Returns seconds on all ranks, from idle GPUs to idle GPUs."""
    _settle()
    started = time.perf_counter()
    result = call()
    _settle()
    return time.perf_counter() - started, result


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()


def print_report(report: dict[str, Any]) -> None:
    plain, background = statistics.median(report["plain_step_s"]), report["background"]
    print(f"{report['world_size']} x {report['device']}: {report['bytes'] / 1e9:.2f} GB")
    print(
        f"saving in line: {report['in_line_s']:.1f} s; a step: {plain:.2f} s\n"
        f"saving in the background: training waits {background['stall_s']:.1f} s, written "
        f"after {background['written_s']:.1f} s, steps meanwhile take "
        f"{100 * background['cost_a_step']:+.1f} %"
    )
    print(
        f"resuming: {report['resume_s']:.1f} s; losses "
        + ("are the same" if report["same_losses"] else "DIFFER")
        + f": {report['losses']} and {report['losses_resumed']}"
    )


if __name__ == "__main__":
    main()
