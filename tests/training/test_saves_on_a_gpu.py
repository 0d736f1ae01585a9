"""Checkpoints on a GPU: averages in bf16 come back, and background writing keeps to its step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_longpo.config.train import TrainConfig
from megatron_longpo.training import loop
from tests.parity.cases import TinyModel
from tests.parity.harness import Shelf, policy_parameters
from tests.training.short_runs import CASE, short_config
from tests.training.test_background import after_steps, hold_writing, wait_for
from tests.training.test_checkpoint import assert_bitwise, checkpoints, run_to_end

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_process", "own_signal_handlers")]

GPU_CASE = replace(
    CASE,
    policy=TinyModel(family="qwen2", layers=1, head_dim=64),
    reference=TinyModel(family="qwen2", layers=1, head_dim=64, seed=2),
    dtype="bf16",
)


def config(shelf: Shelf, folder: Path, **sections: Any) -> TrainConfig:
    return short_config(shelf, folder, case=GPU_CASE, **sections)


def inner_states(run: loop.Run) -> list[dict[str, Tensor]]:
    """The fp32 weights and averages that the optimizer has, parameter by parameter."""
    parts = getattr(run.optimizer, "chained_optimizers", [run.optimizer])
    return [
        {
            "param": param,
            **{k: v for k, v in part.optimizer.state[param].items() if k.startswith("exp")},
        }
        for part in parts
        for group in part.optimizer.param_groups
        for param in group["params"]
    ]


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_averages_in_bf16_come_back(
    name: str, distributed: bool, shelf: Shelf, tmp_path: Path
) -> None:
    """Adam's are Transformer Engine's."""
    optimizer = {"name": name, "distributed": distributed, "state_dtype": "bf16"}
    saved = run_to_end(config(shelf, tmp_path, steps=2, optimizer=optimizer))
    resumed = loop.prepare(config(shelf, tmp_path, steps=4, optimizer=optimizer))
    assert resumed.step == 2
    assert_bitwise(policy_parameters(resumed), policy_parameters(saved))
    before, after = inner_states(saved), inner_states(resumed)
    assert before
    averages = {"exp_avg_sq", "exp_avg"} if name == "adam" else {"exp_avg_sq"}
    for mine, theirs in zip(after, before, strict=True):
        assert set(mine) == set(theirs) == {"param", *averages}
        assert_bitwise(mine, theirs)
        assert all(mine[key].dtype == torch.bfloat16 and mine[key].is_cuda for key in averages)
    assert any(state["exp_avg_sq"].any() for state in before)
    loop.train(resumed)
    assert resumed.step == 4


def test_a_checkpoint_is_that_of_its_step(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 3 is done before the process that was forked at step 2 begins to write."""
    gate = tmp_path / "gate"
    parameters: dict[int, dict[str, Tensor]] = {}
    seen: dict[int, list[str]] = {}

    def look(run: loop.Run) -> None:
        parameters[run.step] = policy_parameters(run)
        there = tmp_path / "checkpoints"
        seen[run.step] = checkpoints(tmp_path) if there.exists() else []
        if run.step == 3:
            gate.touch()

    saving = {"interval": 2, "async_save": True}
    with monkeypatch.context() as patch:
        hold_writing(patch, wait_for(gate))
        after_steps(patch, look)
        run_to_end(config(shelf, tmp_path, checkpoint=saving))
    assert seen[3] == ["iter_0000002.writing"]
    assert any(not torch.equal(w, parameters[3][name]) for name, w in parameters[2].items())
    for step in (2, 4):
        resume = {"resume": str(tmp_path / "checkpoints" / f"iter_{step:07}")}
        loaded = loop.prepare(config(shelf, tmp_path / f"from_{step}", checkpoint=resume))
        assert_bitwise(policy_parameters(loaded), parameters[step])
