"""Runs a `Case` the way `longpo train` would, runs the oracle on it, and compares the two."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_longpo.config.train import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ReferenceConfig,
    RunConfig,
    TrainConfig,
    resolve,
)
from megatron_longpo.data.rows.writing import write_rows_jsonl
from megatron_longpo.engine.metric_names import LOSS_KEYS
from megatron_longpo.engine.metrics import Metrics
from megatron_longpo.parallel.groups import Groups, ParallelSizes
from megatron_longpo.training import loop
from megatron_longpo.training.data_parallel import gather_parameters
from tests.oracle import OracleResult, oracle_step
from tests.parity.cases import Case, TinyModel
from tests.parity.gather import gathered
from tests.parity.peft_adapters import gathered_adapters, with_adapters, write_b
from tools.tiny_models import make_tiny_model

RELATIVE = 1e-5
"""Of every logged sum and loss, fp32 against fp32."""
GRADIENT = 1e-5
"""Norm of the difference over the norm."""
TRAIN_SEED = RunConfig().seed
NOISE = 1e-6
"""What a tensor's gradient may be off by, as a part of the whole gradient's norm: a key's bias
has a true gradient of 0."""


class Shelf:
    """Model folders, rows and HF models of a test session, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._models: dict[Any, Any] = {}

    def hf_folder(self, model: TinyModel) -> str:
        # The same name in every process, unlike `hash`.
        folder = self.root / f"{model.family}-{zlib.crc32(repr(model).encode()):x}"
        if not folder.exists():
            settings = asdict(model)
            settings["rope_scaling"] = dict(settings.pop("scaling")) or None
            make_tiny_model(folder=folder, **settings)
        return str(folder)

    def rows_file(self, case: Case) -> str:
        path = self.root / f"rows-{case.name}.jsonl"
        if not path.exists():
            write_rows_jsonl(path, case.rows)
        return str(path)

    def oracle_policy(self, case: Case) -> Any:
        """The policy in transformers; `oracle_step` clears the gradients it finds."""
        key = (case.policy, case.rope_theta, case.rope_scaling, case.lora)
        if key not in self._models:
            self._models[key] = load_policy(self, case)
        return self._models[key]

    def oracle_reference(self, case: Case) -> Any | None:
        if case.reference is None:
            return None
        key = (case.reference, "reference")
        if key not in self._models:
            self._models[key] = load_hf(self.hf_folder(case.reference))
        return self._models[key]


def load_policy(shelf: Shelf, case: Case) -> Any:
    """The policy of a case in transformers, freshly read, with the case's RoPE and adapters."""
    folder = shelf.hf_folder(case.policy)
    config = AutoConfig.from_pretrained(folder)
    rope = dict(case.rope_scaling) if case.rope_scaling else dict(config.rope_parameters)
    rope["rope_theta"] = case.rope_theta or config.rope_parameters["rope_theta"]
    config.rope_parameters = rope
    model = load_hf(folder, config=config)
    return model if case.lora is None else with_adapters(model, case.lora, seed=TRAIN_SEED)


def load_hf(folder: str, **settings: Any) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)
    # transformers drops the embedding gradient of the pad token, also where that token is text
    # (here it is the end of a turn as well). The true gradient has it.
    model.get_input_embeddings().padding_idx = None
    return model.eval()


def train_config(
    case: Case, shelf: Shelf, *, parallel: ParallelConfig | None = None, **sections: Any
) -> TrainConfig:
    """The resolved settings of a case; `sections` replaces whole sections."""
    reference = ReferenceConfig(
        mode="online" if case.reference is not None else "none",
        hf_path=None if case.reference is None else shelf.hf_folder(case.reference),
        context=case.reference_context,
    )
    settings: dict[str, Any] = {
        "model": ModelConfig(
            hf_path=shelf.hf_folder(case.policy),
            rope_theta=case.rope_theta,
            rope_scaling=dict(case.rope_scaling) or None,
            dtype=case.dtype,
        ),
        "reference": reference,
        "data": DataConfig(
            path=shelf.rows_file(case),
            max_length=2000,
            pack_tokens=case.pack_tokens,
            share_prefix=case.share_prefix,
            shuffle=False,
        ),
        "objective": case.objective,
        "parallel": parallel or ParallelConfig(),
        # A learning rate of 0: the step is whole, and the gradient it leaves is not clipped.
        "optimizer": OptimizerConfig(lr=0.0, clip_grad=0.0, distributed=case.distributed_optimizer),
        "train": RunConfig(
            global_batch_pairs=len(case.shapes),
            recompute=case.recompute,
            recompute_modules=case.recompute_modules,
            recompute_layers=case.recompute_layers,
        ),
        "checkpoint": CheckpointConfig(interval=0),
        "logging": LoggingConfig(dir=str(shelf.root / f"run-{case.name}"), tensorboard=False),
        "lora": case.lora,
    }
    return resolve(TrainConfig(**{**settings, **sections}))


def parallel_config(sizes: ParallelSizes, *, pipeline_layout: str | None = None) -> ParallelConfig:
    """The settings that lead to groups of these sizes."""
    comm: Literal["a2a", "all_gather", "a2a+all_gather"] = "a2a+all_gather"
    if sizes.context_inner in (1, sizes.context):
        comm = "all_gather" if sizes.context_inner == 1 else "a2a"
    return ParallelConfig(
        tensor=sizes.tensor,
        pipeline=sizes.pipeline,
        virtual_pipeline=sizes.virtual_pipeline,
        pipeline_layout=pipeline_layout,
        context=sizes.context,
        context_comm=comm,
        context_inner=sizes.context_inner if comm == "a2a+all_gather" else None,
        sequence=sizes.sequence,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseResult:
    metrics: Metrics
    """The step's row of metrics.jsonl."""
    gradients: dict[str, Tensor]
    """By Hugging Face name, as `OracleResult` has them."""


def run_case(
    case: Case, shelf: Shelf, groups: Groups, *, parallel: ParallelConfig | None = None
) -> CaseResult:
    """One optimizer step through everything that `longpo train` runs, on the groups of this rank.

    `groups` are those that `parallel.groups.initialize` has made in this process, `parallel` the
    settings that lead to them; None = one process.
    """
    run = loop.prepare(train_config(case, shelf, parallel=parallel))
    assert run.groups is groups
    if case.lora is not None:
        write_b(run)
    metrics = loop.train_step(run)
    return CaseResult(metrics=metrics, gradients=policy_gradients(run))


def policy_gradients(run: loop.Run) -> dict[str, Tensor]:
    """The gradient that the last step left, whole, by Hugging Face name or, of adapters, PEFT's."""
    return _gathered_trained(run, lambda parameter: parameter.main_grad)


def policy_parameters(run: loop.Run) -> dict[str, Tensor]:
    """What trains of the policy, by the same names, copied."""
    gather_parameters(run.model)
    return _gathered_trained(run, lambda parameter: parameter)


def _gathered_trained(
    run: loop.Run, of: Callable[[torch.nn.Parameter], Tensor]
) -> dict[str, Tensor]:
    return gathered(run, of) if run.config.lora is None else gathered_adapters(run, of)


def trained(model: Any) -> dict[str, Tensor]:
    """The parameters of a transformers or PEFT model that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def oracle_for(case: Case, shelf: Shelf) -> OracleResult:
    """The same step in plain transformers and torch."""
    policy = shelf.oracle_policy(case)
    result = oracle_step(
        policy,
        shelf.oracle_reference(case),
        case.rows,
        **oracle_settings(train_config(case, shelf)),
    )
    return replace(result, gradients={name: result.gradients[name] for name in trained(policy)})


def oracle_settings(config: TrainConfig) -> dict[str, Any]:
    """The objective of resolved settings as keyword arguments of the oracle."""
    return {**asdict(config.objective), "reference_context": config.reference.context}


def compare(ours: CaseResult, oracle: OracleResult, *, beta: float) -> None:
    """Raises AssertionError where a metric or a gradient is not the oracle's."""
    compare_metrics(ours.metrics, oracle, beta=beta)
    assert set(ours.gradients) == set(oracle.gradients)
    squared_difference = 0.0
    for name, expected in oracle.gradients.items():
        actual = ours.gradients[name]
        assert torch.isfinite(actual).all(), name
        difference = float((actual.double() - expected.double()).norm())
        allowed = GRADIENT * float(expected.norm()) + NOISE * oracle.grad_norm
        assert difference <= allowed, f"{name}: off by {difference:.3g}, allowed {allowed:.3g}"
        squared_difference += difference**2
    assert squared_difference**0.5 <= GRADIENT * oracle.grad_norm


def compare_metrics(
    ours: Metrics, oracle: OracleResult, *, beta: float, relative: float = RELATIVE
) -> None:
    """Compares what the oracle has too, and wants null for what the objective has not."""
    expected = oracle.metrics
    for key in (*{**dict.fromkeys(LOSS_KEYS), **expected}, "grad_norm"):
        actual = ours[key]
        if key not in expected:
            assert actual is None, f"{key} is {actual}, and the objective has none"
            continue
        assert isinstance(actual, float) and math.isfinite(actual), f"{key} is {actual}"
        difference = abs(actual - expected[key])
        allowed = relative * abs(expected[key]) + _slack(key, oracle, beta=beta, relative=relative)
        assert difference <= allowed, f"{key}: {actual}, not {expected[key]} (within {allowed:.3g})"


def _slack(key: str, oracle: OracleResult, *, beta: float, relative: float) -> float:
    """What rounding leaves of a difference of large sums, which may itself be next to 0."""
    if not key.startswith("rewards/"):
        return 0.0
    rounding = relative * sum(
        abs(value) for name, value in oracle.metrics.items() if "logps/" in name
    )
    if key != "rewards/accuracies":
        return beta * rounding
    margins = [pair.chosen_reward - pair.rejected_reward for pair in oracle.pairs]
    return sum(abs(margin) <= beta * rounding for margin in margins) / len(margins)
