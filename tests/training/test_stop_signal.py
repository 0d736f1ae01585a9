"""A real `longpo train` in a process of its own, told to stop as a scheduler would tell it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_longpo.engine.run_folder import plain_config
from megatron_longpo.errors import EXIT_STOPPED_ON_REQUEST
from tests.parity.harness import Shelf
from tests.training.short_runs import metric_rows, short_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_signal_to_the_job_saves_and_exits_with_75(
    async_save: bool, shelf: Shelf, tmp_path: Path
) -> None:
    """All processes get it, those that help to write checkpoints too."""
    folder = tmp_path / "run"
    saving = {"interval": 1, "async_save": async_save}
    config = short_config(shelf, folder, steps=100_000, checkpoint=saving)
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(plain_config(config)))
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_longpo", "train", "--config", str(path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while not (folder / "metrics.jsonl").exists() or len(metric_rows(folder)) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    step = metric_rows(folder)[-1]["step"]
    assert process.returncode == EXIT_STOPPED_ON_REQUEST, errors
    # Libraries may have warned before.
    assert errors.splitlines()[-1] == f"longpo: stopped at step {step} of 100000, checkpoint saved"
    assert "Traceback" not in errors
    tracker = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == f"{step}\n"
