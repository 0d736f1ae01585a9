"""One optimizer step in bf16 against the fp32 oracle: cases and comparison."""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict, replace
from typing import Any

import torch

from megatron_longpo.config.train import ModelConfig
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.training import loop
from tests.oracle import OracleResult
from tests.parity.cases import ROW_SHAPES, Case, RowShape, TinyModel
from tests.parity.harness import (
    CaseResult,
    Shelf,
    parallel_config,
    policy_gradients,
    train_config,
)
from tools.tiny_models import make_tiny_model

TOLERANCE = 2e-2
"""Of losses, of sums and of the whole gradient, as a part of its norm."""

LONG = RowShape(
    prompt_length=700,
    chosen_answer_lengths=(60, 150),
    rejected_answer_lengths=(140, 40),
    chunk_lengths=(200, 130),
)
"""Long enough for the kernels' own tiles, and for every kernel to be given its blocks."""

CASES = tuple(
    Case(
        name=f"gpu_{family}",
        shapes=(LONG, ROW_SHAPES["three_turns"]),
        policy=TinyModel(family=family, head_dim=64, tied=tied),
        reference=TinyModel(family=family, head_dim=64, seed=2),
        dtype="bf16",
    )
    for family, tied in (("mistral", False), ("qwen2", False), ("qwen3", True))
)
"""No bias, q/k/v bias, and q/k norm with a tied output layer."""


class Bf16Shelf(Shelf):
    """A shelf whose weights bf16 holds exactly, so that both sides train the same model."""

    def hf_folder(self, model: TinyModel) -> str:
        folder = self.root / f"{model.family}-bf16-{zlib.crc32(repr(model).encode()):x}"
        if not folder.exists():
            settings = asdict(model)
            settings["rope_scaling"] = dict(settings.pop("scaling")) or None
            make_tiny_model(folder=folder, dtype=torch.bfloat16, **settings)
        return str(folder)


def run_step(
    case: Case,
    shelf: Shelf,
    groups: Groups,
    *,
    layout: str | None = None,
    optimizer: Any = None,
    train: Any = None,
    **model: Any,
) -> CaseResult:
    """One step of `longpo train`; `optimizer`, `train` and `model` are settings of the sections."""
    config = train_config(
        case,
        shelf,
        parallel=parallel_config(groups.sizes, pipeline_layout=layout),
    )
    model_config: ModelConfig = replace(config.model, **model)
    config = replace(
        config,
        model=model_config,
        optimizer=replace(config.optimizer, **(optimizer or {})),
        train=replace(config.train, **(train or {})),
    )
    run = loop.prepare(config)
    metrics = loop.train_step(run)
    return CaseResult(metrics=metrics, gradients=policy_gradients(run))


def gradient_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, over all tensors together."""
    assert set(actual) == set(expected)
    squared = {"difference": 0.0, "norm": 0.0}
    for name, wanted in expected.items():
        squared["difference"] += float((actual[name].double() - wanted.double()).norm()) ** 2
        squared["norm"] += float(wanted.double().norm()) ** 2
    return math.sqrt(squared["difference"] / squared["norm"])


def check_step(ours: CaseResult, oracle: OracleResult) -> None:
    """Raises AssertionError where a loss, a sum or the gradient is further off than bf16 is."""
    for key in ("loss", "nll_loss", "preference_loss", "logps/chosen", "logps/rejected"):
        actual, expected = ours.metrics[key], oracle.metrics[key]
        assert actual is not None and math.isfinite(actual), f"{key} is {actual}"
        assert abs(actual - expected) <= TOLERANCE * abs(expected), f"{key}: {actual}, {expected}"
    error = gradient_error(ours.gradients, oracle.gradients)
    assert error <= TOLERANCE, f"gradient: off by {error:.3g}"
