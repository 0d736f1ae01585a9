"""Checkpoints written while training goes on: seen when they are whole, and of their own step."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed.checkpoint import CheckpointException

from checkpoints_convert.torch_dist import TRACKER_NAME
from megatron_longpo.parallel import groups
from megatron_longpo.training import checkpoint, loop
from megatron_longpo.training.background import BackgroundSaves
from tests.parity.harness import Shelf, policy_parameters
from tests.torchrun import assert_end
from tests.training.short_runs import metric_rows, short_config
from tests.training.test_checkpoint import assert_bitwise, checkpoints, run_to_end

pytestmark = pytest.mark.usefixtures("single_process", "own_signal_handlers")

Patch = pytest.MonkeyPatch


def hold_writing(patch: Patch, before: Callable[[], None]) -> None:
    """`before` runs in each writing process before it writes."""
    save = checkpoint.dist_checkpointing.save

    def save_held(*arguments: Any, **settings: Any) -> Any:
        request = save(*arguments, **settings)
        if request is None:
            return None
        write = request.async_fn

        def write_held(*arguments: Any, **settings: Any) -> None:
            before()
            write(*arguments, **settings)

        return request._replace(async_fn=write_held)

    patch.setattr(checkpoint.dist_checkpointing, "save", save_held)


def wait_for(gate: Path) -> Callable[[], None]:
    def wait() -> None:
        while not gate.exists():
            time.sleep(0.01)

    return wait


def after_steps(patch: Patch, then: Callable[[loop.Run], None]) -> None:
    step = loop.train_step

    def train_step(run: loop.Run) -> Any:
        row = step(run)
        then(run)
        return row

    patch.setattr(loop, "train_step", train_step)


def test_steps_go_on_and_the_checkpoint_is_that_of_its_step(
    shelf: Shelf, tmp_path: Path, monkeypatch: Patch
) -> None:
    straight = run_to_end(short_config(shelf, tmp_path / "straight"))
    folder, gate = tmp_path / "run", tmp_path / "gate"
    config = short_config(shelf, folder, checkpoint={"interval": 2, "async_save": True})
    seen: dict[int, list[str]] = {}

    def look(run: loop.Run) -> None:
        there = folder / "checkpoints"
        seen[run.step] = checkpoints(folder) if there.exists() else []
        if run.step == 3:
            gate.touch()

    with monkeypatch.context() as patch:
        hold_writing(patch, wait_for(gate))
        after_steps(patch, look)
        run_to_end(config)
    assert seen[2] == [] and seen[3] == ["iter_0000002.writing"]
    assert checkpoints(folder) == ["iter_0000002", "iter_0000004", TRACKER_NAME]
    # The weights of step 3 were there before those of step 2 were on disk.
    again = short_config(
        shelf,
        tmp_path / "again",
        checkpoint={"resume": str(folder / "checkpoints" / "iter_0000002")},
    )
    assert_bitwise(policy_parameters(run_to_end(again)), policy_parameters(straight))
    assert metric_rows(tmp_path / "again") == metric_rows(tmp_path / "straight")[2:]
    assert metric_rows(folder) == metric_rows(tmp_path / "straight")


def test_a_save_waits_for_the_one_before(shelf: Shelf, tmp_path: Path, monkeypatch: Patch) -> None:
    gate = tmp_path / "gate"
    saving = {"interval": 1, "async_save": True, "keep": 2}
    run = loop.prepare(short_config(shelf, tmp_path, steps=3, checkpoint=saving))
    wait = run.saves.wait
    trackers: list[str] = []

    def open_and_wait() -> None:
        gate.touch()
        wait()
        tracker = tmp_path / "checkpoints" / TRACKER_NAME
        trackers.append(tracker.read_text() if tracker.exists() else "")
        gate.unlink()

    hold_writing(monkeypatch, wait_for(gate))
    monkeypatch.setattr(run.saves, "wait", open_and_wait)
    loop.train(run)
    assert trackers == ["", "1\n", "2\n"]
    assert checkpoints(tmp_path) == ["iter_0000002", "iter_0000003", TRACKER_NAME]


def test_a_save_that_fails_ends_the_run_and_leaves_the_former(
    shelf: Shelf, tmp_path: Path, monkeypatch: Patch
) -> None:
    run_to_end(short_config(shelf, tmp_path, steps=1))
    config = short_config(shelf, tmp_path, checkpoint={"interval": 1, "async_save": True})

    def fail() -> None:
        raise SystemExit(1)

    with monkeypatch.context() as patch:
        hold_writing(patch, fail)
        with pytest.raises(CheckpointException):
            run_to_end(config)
    assert (tmp_path / "checkpoints" / TRACKER_NAME).read_text() == "1\n"
    assert run_to_end(config).step == 4
    assert checkpoints(tmp_path) == ["iter_0000003", "iter_0000004", TRACKER_NAME]


def test_a_run_that_fails_ends_its_writers(
    shelf: Shelf, tmp_path: Path, monkeypatch: Patch
) -> None:
    def fail_at_two(run: loop.Run) -> None:
        if run.step == 2:
            raise FloatingPointError("the loss of step 2 is nan")

    config = short_config(shelf, tmp_path, checkpoint={"interval": 1, "async_save": True})
    before = len(multiprocessing.active_children())
    with monkeypatch.context() as patch:
        hold_writing(patch, wait_for(tmp_path / "never"))
        after_steps(patch, fail_at_two)
        with pytest.raises(FloatingPointError):
            run_to_end(config)
    writers = [p for p in multiprocessing.active_children() if "Manager" not in p.name]
    assert len(writers) <= before
    assert checkpoint.newest(tmp_path / "checkpoints") is None


def _start_writing(folder: Path) -> None:
    """A rank whose writer forks another process, and that waits, as both do."""
    groups.initialize(groups.ParallelSizes())

    def note() -> None:
        path = folder / f"{os.getpid()}.new"
        path.touch()
        path.rename(path.with_suffix(".pid"))
        time.sleep(120)

    def write() -> None:
        multiprocessing.get_context("fork").Process(target=note).start()
        note()

    BackgroundSaves().start(
        AsyncRequest(async_fn=write, async_fn_args=(), finalize_fns=[]), publish=lambda: None
    )
    time.sleep(120)


def test_writers_end_with_a_rank_that_is_killed(tmp_path: Path) -> None:
    rank = multiprocessing.get_context("spawn").Process(target=_start_writing, args=(tmp_path,))
    rank.start()
    deadline = time.monotonic() + 60
    while len(found := list(tmp_path.glob("*.pid"))) < 2:
        assert rank.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    writers = [psutil.Process(int(path.stem)) for path in found]
    assert all(writer.is_running() for writer in writers)
    rank.kill()
    assert_end(writers, timeout_s=20)
    rank.join()
