"""`longpo reference` on several ranks: any layout, killed and stopped at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import yaml

from megatron_longpo.config.train import ParallelConfig, TrainConfig
from megatron_longpo.engine.run_folder import plain_config
from megatron_longpo.errors import EXIT_DONE, EXIT_STOPPED_ON_REQUEST
from tests.parity.harness import Shelf
from tests.reference.cached_runs import cached_config
from tests.reference.reference_ranks import RUNS, two_layers
from tests.torchrun import ROOT, rank_environment, torchrun
from tests.training.short_runs import CASE, metric_rows, short_config

PATIENCE_S = 120


def test_scored_under_one_layout_and_trained_under_another(shelf: Shelf, tmp_path: Path) -> None:
    # Made here: ranks that made the same folder at once would get in each other's way.
    for _, _, name in RUNS:
        cached_config(shelf, tmp_path, case=two_layers(name))
    result = torchrun("tests/reference/reference_ranks.py", str(shelf.root), str(tmp_path), ranks=2)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert result.stdout.count("same: ") == len(RUNS)


def test_killed_and_stopped_it_goes_on_and_training_follows(shelf: Shelf, tmp_path: Path) -> None:
    """The commands as a user gives them, with one YAML, under two layouts."""
    many = replace(CASE, name="cached-many", shapes=CASE.shapes * 30)
    folder = tmp_path / "run"
    config = short_config(shelf, folder, case=many, steps=3)
    file = write(config, tmp_path / "train.yaml")
    two_ranks = ("--nproc", "2", "--parallel.context", "2")

    def num_parts() -> int:
        return len(list(folder.glob("reference_logps/*/part-*.npz")))

    process = start("reference", file, *two_ranks)
    wait_for(process, lambda: num_parts() >= 2)
    launcher = psutil.Process(process.pid)
    for member in [*launcher.children(recursive=True), launcher]:
        member.kill()
    process.communicate()
    killed_at = num_parts()

    process = start("reference", file)
    wait_for(process, lambda: num_parts() > killed_at)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == EXIT_STOPPED_ON_REQUEST, errors
    assert errors.startswith("longpo: stopped with ") and errors.count("\n") == 1
    assert "of 300 rows scored and saved; the same command goes on" in errors

    process = start("reference", file, *two_ranks)
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == EXIT_DONE, errors
    assert "of 300 rows" in output and ": has 0 of" not in output
    process = start("train", file, "--reference.mode", "cached")
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == EXIT_DONE, errors
    assert [row["reference_tokens"] for row in metric_rows(folder)] == [0, 0, 0]


def start(command: str, file: Path, *options: str) -> subprocess.Popen[str]:
    arguments = ["megatron_longpo", command, "--config", str(file), *options]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, **rank_environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], is_time: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_time():
        assert time.monotonic() < deadline, "the moment never came"
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


def write(config: TrainConfig, file: Path) -> Path:
    """Settings of an online run, for the command line to change."""
    values = plain_config(replace(config, parallel=ParallelConfig()))
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file
