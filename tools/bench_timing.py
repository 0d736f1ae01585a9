"""Times and traces training steps; shows the optimizer's and the reference's parts of a trace."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from megatron_longpo.training.loop import Run, train_step
from tools.bench_trace import breakdown, in_range, traced_step


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """The times of one step."""

    seconds: float
    peak_memory_gib: float | None
    """None without a GPU, where a process's peak never falls from mode to mode."""


def timed_step(run: Run) -> Timing:
    """Times a step from idle GPU to idle GPU: the optimizer's last kernels belong to it."""
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


def time_steps(
    runs: Iterable[Run], *, warmup: int, repeats: int, done: Callable[[Run, Timing, bool], None]
) -> None:
    """Times steps of the runs in turn, so that all of them meet the same noise.

    `done` is told of every step: whose it was, what it took, and whether it counts.
    """
    runs = list(runs)
    for index in range(warmup + repeats):
        for run in runs:
            done(run, timed_step(run), index >= warmup)


def profiled_step(run: Run, path: Path) -> dict[str, float]:
    """Returns seconds by part of one step under the profiler, which slows it a little."""
    with traced_step(path):
        train_step(run)
    return breakdown(path)


def mark_parts(run: Run) -> None:
    """Shows the optimizer and the reference's layers as ranges of a trace."""
    optimizer: Any = run.optimizer
    optimizer.step = in_range("optimizer", optimizer.step)
    for chunk in run.model:
        _mark_reference(chunk)


def _mark_reference(wrapped: Any) -> None:
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
