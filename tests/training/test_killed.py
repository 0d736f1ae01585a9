"""A run that is killed at any moment and started again ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_longpo.config.train import ParallelConfig
from megatron_longpo.engine.run_folder import plain_config
from megatron_longpo.training.checkpoint import newest
from tests.parity.harness import Shelf
from tests.torchrun import ROOT, assert_end, rank_environment
from tests.training.short_runs import metric_rows, short_config

STEPS, SAVE_EVERY = 12, 3
PATIENCE_S = 120

HOLD = f"""
import pathlib, time

rename = pathlib.Path.rename


def held(path, target):
    if path.name.endswith(".writing"):
        path.with_name("held").touch()
        time.sleep({PATIENCE_S})
    return rename(path, target)


pathlib.Path.rename = held
"""
"""Python runs it at its start: a checkpoint that is written stays unpublished, until the kill."""


def start(config_file: Path, *, held_by: Path | None = None) -> subprocess.Popen[bytes]:
    """Starts `longpo train --nproc 2`; `held_by` is a folder with `HOLD` as sitecustomize.py."""
    command = [sys.executable, "-W", "ignore", "-m", "megatron_longpo", "train", "--nproc", "2"]
    environment = rank_environment()
    if held_by is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(held_by), environment["PYTHONPATH"]])
    return subprocess.Popen(
        [*command, "--config", str(config_file)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def await_moment(process: subprocess.Popen[bytes], is_time: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_time():
        assert time.monotonic() < deadline, "the moment to kill never came"
        assert process.poll() is None, process.communicate(timeout=30)[1][-3000:]
        time.sleep(0.001)


def kill_when(
    config_file: Path, is_time: Callable[[], bool], *, held_by: Path | None = None
) -> None:
    """Starts the run and kills all its processes as soon as `is_time`."""
    process = start(config_file, held_by=held_by)
    await_moment(process, is_time)
    # Torchrun's workers have sessions of their own.
    launcher = psutil.Process(process.pid)
    for member in [*launcher.children(recursive=True), launcher]:
        member.kill()
    process.communicate()


def finish(config_file: Path) -> None:
    process = start(config_file)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors[-3000:]


def write_settings(
    shelf: Shelf, folder: Path, file: Path, *, steps: int = STEPS, async_save: bool = False
) -> Path:
    config = short_config(
        shelf,
        folder,
        steps=steps,
        train={"global_batch_pairs": 2},
        checkpoint={"interval": SAVE_EVERY, "keep": 2, "async_save": async_save},
        parallel=ParallelConfig(context=2),
    )
    file.write_text(yaml.safe_dump(plain_config(config)), encoding="utf-8")
    return file


@pytest.mark.parametrize("async_save", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_killed_thrice_and_resumed_gives_the_same_metrics(
    async_save: bool, shelf: Shelf, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(write_settings(shelf, whole, tmp_path / "whole.yaml"))
    file = write_settings(shelf, broken, tmp_path / "broken.yaml", async_save=async_save)
    rng = random.Random(20)
    metrics = broken / "metrics.jsonl"

    def has_steps(count: int) -> Callable[[], bool]:
        return lambda: metrics.exists() and metrics.read_bytes().count(b'"loss"') >= count

    hold = tmp_path / "hold"
    hold.mkdir()
    (hold / "sitecustomize.py").write_text(HOLD)
    checkpoints = broken / "checkpoints"

    # Before the first checkpoint, while one is written, and between two of them.
    kill_when(file, has_steps(rng.randint(1, SAVE_EVERY - 1)))
    kill_when(file, (checkpoints / "held").exists, held_by=hold)
    assert len(list(checkpoints.glob("iter_*.writing/*"))) > 1 and newest(checkpoints) is None
    kill_when(file, has_steps(rng.randint(2 * SAVE_EVERY + 1, 3 * SAVE_EVERY - 1)))
    finish(file)
    assert [row["step"] for row in metric_rows(whole)] == list(range(1, STEPS + 1))
    assert metric_rows(broken) == metric_rows(whole)


@pytest.mark.parametrize("is_training", [True, False])
def test_ranks_end_with_their_launcher(is_training: bool, shelf: Shelf, tmp_path: Path) -> None:
    file = write_settings(shelf, tmp_path / "run", tmp_path / "run.yaml", steps=100_000)
    process = start(file)
    launcher = psutil.Process(process.pid)
    metrics = tmp_path / "run" / "metrics.jsonl"
    is_up = metrics.exists if is_training else lambda: len(launcher.children()) == 2
    await_moment(process, is_up)
    ranks = launcher.children()
    launcher.kill()
    assert_end(ranks, timeout_s=30)
    process.communicate()
