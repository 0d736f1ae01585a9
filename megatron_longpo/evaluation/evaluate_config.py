"""Settings of `longpo evaluate`; imports neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any, Literal

from megatron_longpo.config import (
    DataConfig,
    LoggingConfig,
    ModelConfig,
    ParallelConfig,
    ReferenceConfig,
    RunConfig,
    TrainConfig,
    resolve,
)
from megatron_longpo.config_fields import check_limits, limits
from megatron_longpo.errors import UserError
from megatron_longpo.evaluation.config import EvaluationConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What of which model is measured, or which evaluations are compared."""

    models: tuple[str, ...]
    """The model: a Hugging Face folder or hub id, or a Megatron checkpoint (an iter_* folder, or
    its parent). With compare: what this command wrote, or logging.dir folders of training runs."""
    output: str | None = None
    """Folder for evaluation.json, which is gone on with where it is there; with compare, for table
    and plots, null = comparison."""
    compare: bool = False
    """Compare evaluations that are there: a table, JSON, CSV, Markdown and plots."""
    base: str | None = None
    """Hugging Face folder or hub id of the model that evaluation.retention compares with. It keeps
    its own RoPE."""
    adapter_base: str | None = None
    """Where the model of a checkpoint's adapters is, if not where training found it."""
    generate: bool = False
    """Also let the model answer the retrieval questions, greedily, by transformers: one process and
    a Hugging Face model."""
    new_tokens: int = field(default=32, metadata=limits(at_least=1))
    """Most tokens of such an answer."""
    rope_theta: float | None = field(default=None, metadata=limits(above=0))
    """RoPE base to evaluate with; null = the model's own."""
    rope_scaling: dict[str, Any] | None = None
    """RoPE scaling to evaluate with, written as in an HF config; null = the model's own."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and activations."""
    attention_kernel: Literal["auto", "te", "cudnn", "flash_attn", "varlen", "sdpa"] = "auto"
    """Attention kernel, as model.attention_kernel of longpo train."""
    layers: Literal["auto", "te", "local"] = "auto"
    """Layers, as model.layers of longpo train."""
    pack_tokens: int | None = field(default=None, metadata=limits(at_least=1))
    """Most tokens of a microbatch; null = the longest row."""
    overwrite: bool = False
    """Begin anew where the output holds an evaluation of other settings."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def folder(self) -> PurePath:
        """`output`, filled."""
        return PurePath(self.output or "comparison")


def resolve_evaluate(config: EvaluateConfig) -> EvaluateConfig:
    """Checks the settings that depend on each other."""
    check_limits(config)
    if config.compare:
        return config
    if len(config.models) != 1:
        raise UserError(
            f"models ({', '.join(config.models) or 'none'}): one model is evaluated at a time. "
            "Give one, or --compare with what was evaluated before"
        )
    if config.output is None:
        raise UserError("output is missing (a folder for evaluation.json). Give --output FOLDER")
    if config.evaluation.is_off:
        raise UserError(
            "evaluation has no part that is on: nothing is measured. Set evaluation.retrieval, "
            "evaluation.nll or evaluation.retention, such as --evaluation.retrieval.samples 10"
        )
    if (config.base is None) == (config.evaluation.retention is not None):
        reason = (
            "is missing: evaluation.retention compares with it. Give --base MODEL"
            if config.base is None
            else f"({config.base}) is for evaluation.retention, which is null. Set that, or remove "
            "base"
        )
        raise UserError(f"base {reason}")
    if config.generate:
        _check_generation(config)
    resolved = training_config(config, hf_path=config.models[0])
    return replace(config, parallel=resolved.parallel)


def _check_generation(config: EvaluateConfig) -> None:
    if config.evaluation.retrieval is None:
        raise UserError(
            "generate (true) answers the questions of evaluation.retrieval, which is null. Set it, "
            "or leave generate out"
        )
    for key in ("rope_theta", "rope_scaling"):
        if getattr(config, key) is not None:
            raise UserError(
                f"generate (true): transformers reads the model as its folder says, without {key}. "
                f"Leave {key} out, or put it into the folder's config.json"
            )


def training_config(config: EvaluateConfig, *, hf_path: str) -> TrainConfig:
    """The settings of a training run that would build this model in this layout."""
    return resolve(
        TrainConfig(
            model=ModelConfig(
                hf_path=hf_path,
                dtype=config.dtype,
                attention_kernel=config.attention_kernel,
                layers=config.layers,
            ),
            reference=ReferenceConfig(hf_path=config.base),
            data=DataConfig(path="none"),
            parallel=config.parallel,
            # More pairs than ranks: nothing is dealt here by global batches.
            train=RunConfig(global_batch_pairs=2**31, recompute="none"),
            logging=LoggingConfig(dir=str(config.folder)),
            evaluation=config.evaluation,
        )
    )


def check_evaluate_world(config: EvaluateConfig, world_size: int) -> None:
    """Refuses a number of processes that the parallel sizes do not divide, or cannot be used."""
    from megatron_longpo.config import check_world

    if config.compare or config.generate:
        if world_size > 1:
            key = "compare" if config.compare else "generate"
            raise UserError(
                f"{key} (true) runs in one process, and {world_size} were started. Leave out "
                f"--nproc, or {key}"
            )
        return
    check_world(training_config(config, hf_path=config.models[0]), world_size)
