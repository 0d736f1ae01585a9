"""Saving is timed in line and in the background, and what is resumed goes on as it would have."""

from __future__ import annotations

from pathlib import Path

from megatron_longpo.parallel.groups import Groups
from tests.tools.test_bench import TINY
from tools import bench_checkpoint, bench_step


def test_both_ways_of_saving_are_timed(tmp_path: Path, single_process: Groups) -> None:
    arguments = bench_step.parse_arguments(["--context", "200", "--repeats", "2", *TINY])
    mode = bench_step.Mode(share_prefix=True, reference="none")
    (run,) = bench_step.make_runs(arguments, [mode], tmp_path / "inputs").values()
    report = bench_checkpoint.bench(run, tmp_path / "checkpoints", warmup=1, steps=2)
    assert report["same_losses"] and len(set(report["losses"])) == 2
    # fp32 weights, RMSprop's averages, and weights as the model has them.
    assert report["bytes"] > 3 * 4 * sum(p.numel() for p in run.model[0].parameters())
    assert report["background"]["stall_s"] > 0 and report["resume_s"] > 0
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"background", "in_line"}
