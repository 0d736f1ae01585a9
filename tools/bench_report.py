"""The results of a benchmark of steps: printed as they come, saved, and a table at the end.

The file is written anew whenever something is known, so that a run that is cut short leaves what it
has measured, and its last line says where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megatron_longpo.data.jsonl import write_whole
from megatron_longpo.engine.flops import step_flops
from megatron_longpo.training.loop import Run
from tools.bench_timing import Timing


class Report:
    """Numbers by mode, as plain JSON types; only the first rank prints."""

    def __init__(self, arguments: argparse.Namespace, *, is_main: bool, world_size: int) -> None:
        self._is_main = is_main
        self._world_size = world_size
        self._json: Path | None = arguments.json
        self.modes: dict[str, dict[str, Any]] = {}
        self._head = {
            "device": device_name(),
            "world_size": world_size,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "settings": {name: _plain(value) for name, value in vars(arguments).items()},
        }

    def say(self, line: str) -> None:
        """Prints what has been done, and how long after the start of this process."""
        if self._is_main:
            elapsed = time.time() - psutil.Process().create_time()
            print(f"[{elapsed:6.1f} s] {line}", flush=True)

    def start_mode(self, name: str, run: Run) -> None:
        sizes = run.pairs.sizes
        self.modes[name] = {
            "policy_tokens": sum(size.policy_tokens for size in sizes),
            "reference_tokens": sum(size.reference_tokens for size in sizes),
            "median_step_s": None,
            "step_s": [],
            "warmup_s": [],
            "model_tflops_per_gpu": None,
            "peak_memory_gib": None,
            "bare_s": None,
            "efficiency": None,
            "sustained_s": None,
            "sustained_efficiency": None,
            "breakdown_s": None,
            "communication_share": None,
            "imbalance_share": None,
        }

    def add_step(self, name: str, run: Run, timing: Timing, *, counts: bool) -> None:
        """Adds a step; one that does not count is kept apart."""
        mode = self.modes[name]
        mode["step_s" if counts else "warmup_s"].append(timing.seconds)
        if counts:
            flops = step_flops(run.pairs.sizes, run.sources.policy, run.sources.online_arch)
            mode["median_step_s"] = median = statistics.median(mode["step_s"])
            mode["model_tflops_per_gpu"] = flops / median / run.groups.world_size / 1e12
            if timing.peak_memory_gib is not None:
                mode["peak_memory_gib"] = max(
                    timing.peak_memory_gib, mode["peak_memory_gib"] or 0.0
                )
        kind = "step" if counts else "warm-up step"
        memory = timing.peak_memory_gib
        self.say(
            f"{name}: {kind} {timing.seconds:.3f} s"
            + (f", peak {memory:.1f} GiB" if memory is not None else "")
        )
        self.save()

    def add_breakdown(self, name: str, seconds: dict[str, float]) -> None:
        """Adds this rank's step by part; every rank calls this.

        A rank that is done early waits in communication for the last one, which itself does not
        wait. So what the ranks communicate alone beyond the one that does it least, in the mean,
        is their imbalance.
        """
        mode = self.modes[name]
        step = sum(time for part, time in seconds.items() if part != "overlapped communication")
        alone = [seconds.get("communication", 0.0)] * self._world_size
        dist.all_gather_object(alone, alone[0])
        mode["breakdown_s"] = seconds
        mode["communication_share"] = alone[0] / step
        mode["imbalance_share"] = (statistics.mean(alone) - min(alone)) / step
        self.say(f"{name}: step traced")
        self.save()

    def add_bare(self, name: str, key: str, seconds: dict[str, float]) -> None:
        """Adds bare times; `key` is `bare` or `sustained`, efficiencies use the steps so far."""
        mode = self.modes[name]
        mode[f"{key}_s"] = seconds
        efficiency = "efficiency" if key == "bare" else f"{key}_efficiency"
        mode[efficiency] = sum(seconds.values()) / mode["median_step_s"]
        self.say(f"{name}: {key} products and attention timed")
        self.save()

    def save(self) -> None:
        """Writes the file, by renaming a new one."""
        if self._json is None or not self._is_main:
            return
        report = {**self._head, "modes": self.modes, "speedup": self.speedups()}
        write_whole(self._json, json.dumps(report, indent=2) + "\n")

    def speedups(self) -> dict[str, float]:
        """Returns how much faster the shared layout is, by reference, where both layouts ran."""
        found = {}
        for name, shared in self.modes.items():
            unshared = self.modes.get(f"un{name}")
            if unshared and shared["median_step_s"] and unshared["median_step_s"]:
                reference = name.rpartition(" ")[2]
                found[reference] = unshared["median_step_s"] / shared["median_step_s"]
        return found

    def print(self) -> None:
        if not self._is_main:
            return
        head = self._head
        print(f"{head['world_size']} x {head['device']}, torch {head['torch']}")
        for name, mode in self.modes.items():
            _print_mode(name, mode)
        for reference, speedup in self.speedups().items():
            print(f"sharing the prefix is {speedup:.2f} times as fast (reference {reference})")


def _print_mode(name: str, mode: dict[str, Any]) -> None:
    memory, efficiency, steady, share, imbalance = (
        mode[key]
        for key in (
            "peak_memory_gib",
            "efficiency",
            "sustained_efficiency",
            "communication_share",
            "imbalance_share",
        )
    )
    print(
        f"{name}: {mode['policy_tokens']} + {mode['reference_tokens']} tokens, "
        f"median {mode['median_step_s']:.3f} s, "
        f"{mode['model_tflops_per_gpu']:.0f} model TFLOP/s a GPU"
        + (f", efficiency {efficiency:.3f}" if efficiency is not None else "")
        + (f" ({steady:.3f} sustained)" if steady is not None else "")
        + (f", communication {100 * share:.1f} %" if share else "")
        + (f", imbalance {100 * imbalance:.1f} %" if imbalance else "")
        + (f", peak {memory:.1f} GiB" if memory is not None else "")
    )
    titles = {"bare": "bare_s", "sustained": "sustained_s", "step": "breakdown_s"}
    for title, parts in ((title, mode[key]) for title, key in titles.items() if mode[key]):
        shown = ", ".join(f"{part} {seconds:.3f}" for part, seconds in parts.items())
        print(f"    {title}: {shown}")


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "CPU"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
