"""Where the time of a step went, read from a trace of torch.profiler.

A kernel counts for the innermost of our ranges that it ran in (`attention`, `head`, `reference`,
`optimizer`), else by its name: NCCL's are communication, matrix products are linears, and the
rest is norms, activations and copies. Everything within the reference's range is the reference's.
Communication is the time in which NCCL's kernels ran alone, waiting for other ranks included; where
others ran beside them it is overlapped communication, which slows these a little. Idle is the time
in which no kernel ran. Without a GPU the ranges' own times are taken, and gloo's as
communication where they are in none of them; there is no telling apart what is outside.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

RANGES = ("reference", "optimizer", "head", "attention")
"""Outermost first: attention within the reference is the reference's."""
STEP = "step"
PRODUCTS = re.compile(r"gemm|nvjet|cutlass|cublas|xmma|matmul", re.IGNORECASE)
Span = tuple[float, float]


@contextmanager
def traced_step(path: Path) -> Iterator[None]:
    """Runs what is inside as one step and writes the trace, for this file and for Perfetto."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler, record_function(STEP):
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


def in_range(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `call`, which traces show under our name."""

    def wrapped(*args: Any, **settings: Any) -> Any:
        with record_function(name):
            return call(*args, **settings)

    return wrapped


def breakdown(path: Path) -> dict[str, float]:
    """Returns seconds by part of the traced step; they add up to it if no kernels overlap."""
    events = [
        event
        for event in json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        if event.get("ph") == "X"
    ]
    kernels = [
        event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    if not kernels:
        return _breakdown_of_ranges(events)
    (step,) = _spans(events, "user_annotation", STEP)
    ranges = {name: _Spans(_spans(events, "gpu_user_annotation", name)) for name in RANGES}
    sent, computed = [], []
    seconds: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        span = (kernel["ts"], kernel["ts"] + kernel["dur"])
        if "nccl" in kernel["name"].lower():
            sent.append(span)
            continue
        computed.append(span)
        seconds[_part(kernel["name"], sum(span) / 2, ranges)] += kernel["dur"] / 1e6
    busy = _covered(computed + sent)
    if sent:
        alone = busy - _covered(computed)
        seconds["communication"] = alone / 1e6
        seconds["overlapped communication"] = (_covered(sent) - alone) / 1e6
    seconds["idle"] = max(0.0, (step[1] - step[0] - busy) / 1e6)
    return dict(seconds)


def _part(name: str, middle: float, ranges: dict[str, _Spans]) -> str:
    for part, spans in ranges.items():
        if middle in spans:
            return part
    return "linears" if PRODUCTS.search(name) else "norms, activations, copies"


def _breakdown_of_ranges(events: list[dict[str, Any]]) -> dict[str, float]:
    (step,) = _spans(events, "user_annotation", STEP)
    inside: list[Span] = []
    seconds = {}
    for name in RANGES:
        spans = _spans(events, "user_annotation", name)
        before = _covered(inside)
        inside += spans
        seconds[name] = (_covered(inside) - before) / 1e6
    sent = [
        (max(step[0], event["ts"]), min(step[1], event["ts"] + event["dur"]))
        for event in events
        if event["name"].startswith("gloo:")
    ]
    if sent:
        before = _covered(inside)
        inside += sent
        seconds["communication"] = (_covered(inside) - before) / 1e6
    seconds["linears and the rest"] = (step[1] - step[0] - _covered(inside)) / 1e6
    return seconds


def _spans(events: list[dict[str, Any]], category: str, name: str) -> list[Span]:
    """Returns [begin, end) in microseconds of every event of that category and name."""
    return sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == category and event["name"] == name
    )


def _covered(spans: list[Span]) -> float:
    """Returns the length of the spans' union."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


class _Spans:
    """Spans that do not overlap, asked whether one of them holds a moment."""

    def __init__(self, spans: list[Span]) -> None:
        self.begins = [begin for begin, _ in spans]
        self.ends = [end for _, end in spans]

    def __contains__(self, moment: float) -> bool:
        index = bisect_right(self.begins, moment) - 1
        return index >= 0 and moment < self.ends[index]
