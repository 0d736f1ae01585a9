"""Impossible layouts end in one line that says which sizes would do, before weights are read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.config.train import (
    DataConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    check_world,
    resolve,
)
from megatron_longpo.engine import degrees
from megatron_longpo.engine.sources import check_layout, read_models
from megatron_longpo.errors import UserError
from tools.tiny_models import make_tiny_model


def settings(folder: Path, **parallel: Any) -> TrainConfig:
    """12 heads, 4 key/value heads, 6 layers, an MLP of 48; 4 pairs a step."""
    model = folder / "model"
    if not model.exists():
        make_tiny_model(
            "qwen3", model, heads=12, kv_heads=4, head_dim=4, layers=6, ffn=48, tokenizer=False
        )
    return resolve(
        TrainConfig(
            model=ModelConfig(hf_path=str(model)),
            data=DataConfig(path="unread.jsonl", max_length=1000),
            parallel=ParallelConfig(**parallel),
            train=RunConfig(global_batch_pairs=4),
            logging=LoggingConfig(dir=str(folder / "run")),
        )
    )


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (
            {"tensor": 8},
            r"parallel\.tensor \(8\) cannot split 12 heads, 4 key/value heads and an MLP of 48 "
            r"evenly; use 1, 2, 4 or 12",
        ),
        ({"tensor": 3}, r"parallel\.tensor \(3\) cannot split .*; use 1, 2, 4 or 12"),
        (
            {"pipeline": 7},
            r"parallel\.pipeline \(7\) must not exceed the model's 6 layers. Lower it, or give .* "
            r"parallel\.pipeline_layout",
        ),
        (
            {"pipeline": 2, "pipeline_layout": "Ettt|ttL"},
            r"parallel\.pipeline_layout \(Ettt\|ttL\): its 5 layers \(t\) must be the model's 6",
        ),
        (
            {"context": 8, "context_comm": "a2a+all_gather", "context_inner": 8},
            r"parallel\.context_inner \(8\): a2a cannot share 12 heads and 4 key/value heads",
        ),
        (
            {"context": 8, "context_comm": "a2a"},
            r"parallel\.context \(8\): a2a cannot share 12 heads and 4 key/value heads .* use 1, "
            r"2, 3, 4, 6, 12, or parallel\.context_comm all_gather, which takes any size",
        ),
        (
            {"tensor": 4, "context": 2, "context_comm": "a2a"},
            r"parallel\.context \(2\): a2a cannot share 3 heads and 1 key/value heads .* use 1, 3, "
            r"or parallel\.context_comm all_gather",
        ),
    ],
)
def test_a_layout_that_the_model_cannot_be_split_by(
    parallel: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = settings(tmp_path, **parallel)
    sources = read_models(config)
    with pytest.raises(UserError, match=message) as refused:
        check_layout(config, sources)
    assert "\n" not in str(refused.value)


def test_adapters_need_a_layer_on_every_pipeline_rank(tmp_path: Path) -> None:
    config = settings(tmp_path, pipeline=2, pipeline_layout="E|ttttttL")
    config = resolve(dataclasses.replace(config, lora=LoraConfig()))
    with pytest.raises(UserError, match=r"with lora, pipeline rank 0 would have nothing to train"):
        check_layout(config, read_models(config))
    interleaved = dataclasses.replace(
        config.parallel, pipeline_layout="E|ttt|ttt|L", virtual_pipeline=2
    )
    config = resolve(dataclasses.replace(config, parallel=interleaved))
    check_layout(config, read_models(config))


@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor": 12, "pipeline": 6},
        {"pipeline": 4},
        {"pipeline": 2, "virtual_pipeline": 3},
        {"pipeline": 4, "pipeline_layout": "E|ttt|ttt|L"},
        {"context": 7},
        {"context": 8, "context_comm": "a2a+all_gather"},
        {"context": 6, "context_comm": "a2a"},
        {"tensor": 2, "context": 3, "context_comm": "a2a"},
    ],
)
def test_a_layout_that_fits(parallel: dict[str, Any], tmp_path: Path) -> None:
    config = settings(tmp_path, **parallel)
    check_layout(config, read_models(config))


@pytest.mark.parametrize(
    ("context", "tensor", "ranks_here", "expected"),
    [
        # 12 heads and 4 key/value heads.
        (8, 1, None, 4),
        (12, 1, None, 12),
        # 6 of them would be on two machines.
        (12, 1, "8", 4),
        # 6 heads and 2 key/value heads, on 4 ranks of this machine that are not tensor-parallel.
        (12, 2, "8", 2),
        (7, 1, None, 1),
        (8, 2, "1", 1),
    ],
)
def test_heads_are_scattered_as_far_as_heads_and_machine_allow(
    context: int,
    tensor: int,
    ranks_here: str | None,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks_here is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks_here)
    config = settings(tmp_path, context=context, tensor=tensor, context_comm="a2a+all_gather")
    assert degrees.context_inner(config.parallel, read_models(config).built) == expected


def test_sizes_that_do_not_fit_the_world(tmp_path: Path) -> None:
    config = settings(tmp_path, tensor=2, pipeline=3)
    assert check_world(config, 12) == 2
    with pytest.raises(UserError, match=r"= 6 must divide the number of processes \(8\).*start 6"):
        check_world(config, 8)
    with pytest.raises(UserError, match=r"at least the data-parallel size.*Set it to 5"):
        check_world(config, 30)
