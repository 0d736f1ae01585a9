"""Adapters saved under one layout go on under another, and are exported whole."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from checkpoints_convert.megatron_to_hf import run_export
from megatron_longpo.config.convert import ExportConfig
from megatron_longpo.config.train import ParallelConfig
from megatron_longpo.engine.metric_names import LOSS_KEYS
from megatron_longpo.engine.run_folder import plain_config
from megatron_longpo.training import loop
from tests.parity.cases import LORA, TinyModel
from tests.parity.harness import RELATIVE, Shelf, load_hf, policy_parameters
from tests.torchrun import ROOT, rank_environment
from tests.training.short_runs import CASE, metric_rows, short_config

pytestmark = pytest.mark.usefixtures("single_process", "own_signal_handlers")

POLICY = TinyModel(family="qwen2")
LORA_RUN = replace(CASE, name="lora_layouts", policy=POLICY, reference=POLICY, lora=LORA)
OPTIMIZER = {"eps": 1e-5, "warmup_ratio": 0.0, "weight_decay": 0.01}
"""Square averages are tiny at first: with a smaller eps rounding would become direction."""


def config(shelf: Shelf, folder: Path, **more: Any) -> Any:
    return short_config(shelf, folder, case=LORA_RUN, steps=4, optimizer=OPTIMIZER, **more)


@pytest.mark.parametrize(
    ("name", "parallel"),
    [("tensor", ParallelConfig(tensor=2)), ("pipeline", ParallelConfig(pipeline=2))],
)
def test_adapters_of_two_ranks_go_on_in_one_process(
    name: str, parallel: ParallelConfig, shelf: Shelf, tmp_path: Path
) -> None:
    straight = loop.prepare(config(shelf, tmp_path / "straight"))
    loop.train(straight)
    split = tmp_path / "split"
    train_on_two_ranks(
        config(shelf, split, parallel=parallel, checkpoint={"interval": 2, "keep": 2}), tmp_path
    )
    source = str(split / "checkpoints" / "iter_0000002")
    resumed = loop.prepare(config(shelf, tmp_path / "resumed", checkpoint={"resume": source}))
    assert resumed.step == 2
    loop.train(resumed)

    expected = metric_rows(tmp_path / "straight")
    found = metric_rows(split)[:2] + metric_rows(tmp_path / "resumed")
    assert len(found) == 4
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("step", "learning_rate", *LOSS_KEYS, "grad_norm"):
            if not key.startswith("rewards/"):
                assert ours[key] == pytest.approx(theirs[key], rel=RELATIVE), (key, ours["step"])
    before = policy_parameters(loop.prepare(config(shelf, tmp_path / "untrained")))
    after, ends = policy_parameters(straight), policy_parameters(resumed)
    for key, tensor in after.items():
        change = float((tensor - before[key]).norm())
        assert change > 0 and float((ends[key] - tensor).norm()) <= 1e-3 * change, key

    # The checkpoint that two ranks wrote at the end is the whole policy, too.
    run_export(
        ExportConfig(source=str(split / "checkpoints"), destination=str(tmp_path / "split-hf"))
    )
    run_export(
        ExportConfig(
            source=str(tmp_path / "straight" / "checkpoints"), destination=str(tmp_path / "hf")
        )
    )
    one, two = (load_hf(str(tmp_path / folder)) for folder in ("hf", "split-hf"))
    for (key, tensor), other in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(other, tensor, rtol=1e-4, atol=1e-5, msg=key)


def train_on_two_ranks(config: Any, folder: Path) -> None:
    file = folder / "split.yaml"
    file.write_text(yaml.safe_dump(plain_config(config)), encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "megatron_longpo", "train", "--nproc", "2"]
    result = subprocess.run(
        [*command, "--config", str(file)],
        cwd=ROOT,
        env=rank_environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
