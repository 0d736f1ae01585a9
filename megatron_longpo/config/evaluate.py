"""The config of `longpo evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from megatron_longpo.config.evaluation import EvaluationConfig, check_evaluation
from megatron_longpo.config.fields import check_limits, limits
from megatron_longpo.config.harness import HarnessConfig
from megatron_longpo.config.names import AttentionKernel, Dtype, Layers
from megatron_longpo.config.suites import read_suite
from megatron_longpo.config.train import ParallelConfig
from megatron_longpo.config.train_checks import data_parallel_size, filled_parallel
from megatron_longpo.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Which model is measured and how, or which evaluations are compared."""

    models: tuple[str, ...]
    """The model: a Hugging Face folder or hub id, or a Megatron checkpoint (an iter_* folder, or
    its parent). With compare: outputs of this command, or logging.dir folders of training runs."""
    output: str | None = None
    """Output folder. An existing evaluation.json is resumed. With compare: folder for table and
    plots, null = comparison."""
    compare: bool = False
    """Compare existing evaluations: a table, JSON, CSV, Markdown and plots."""
    base: str | None = None
    """Hugging Face folder or hub id of the model that evaluation.retention compares with. It keeps
    its own RoPE."""
    adapter_base: str | None = None
    """Path of the model that a checkpoint's adapters belong to, if it has moved since training."""
    generate: bool = False
    """Also let the model answer the retrieval questions, greedily, with transformers. This needs a
    Hugging Face model, and runs in one process."""
    new_tokens: int = field(default=32, metadata=limits(at_least=1))
    """Maximum tokens of such an answer."""
    rope_theta: float | None = field(default=None, metadata=limits(above=0))
    """RoPE base to evaluate with; null = the model's own."""
    rope_scaling: dict[str, Any] | None = None
    """RoPE scaling to evaluate with, written as in an HF config; null = the model's own."""
    dtype: Dtype = "bf16"
    """Type of weights and activations."""
    attention_kernel: AttentionKernel = "auto"
    """Attention kernel, as model.attention_kernel of longpo train."""
    layers: Layers = "auto"
    """Layers, as model.layers of longpo train."""
    pack_tokens: int | None = field(default=None, metadata=limits(at_least=1))
    """Maximum tokens of a microbatch; null = the longest row."""
    overwrite: bool = False
    """Start again if the output folder holds an evaluation with other settings."""
    suite: tuple[str, ...] | str = ()
    """Benchmarks to run with lm-evaluation-harness, as the section harness says: ruler,
    infinitebench, longbench, mmlu, arc_challenge, hellaswag, winogrande, mt_bench, longbench_chat;
    a list, or names with commas."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def folder(self) -> PurePath:
        """The output folder: `output` or its default."""
        return PurePath(self.output or "comparison")

    @property
    def suites(self) -> tuple[str, ...]:
        """The names in `suite`, each once."""
        names = self.suite.split(",") if isinstance(self.suite, str) else self.suite
        return tuple(dict.fromkeys(name.strip() for name in names if name.strip()))

    @property
    def uses_megatron(self) -> bool:
        """Whether the model is built in Megatron."""
        return not self.evaluation.is_off or self.harness.backend == "megatron"


def resolve_evaluate(config: EvaluateConfig) -> EvaluateConfig:
    """Returns the config, checked, with the parallel sizes filled."""
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
    if config.evaluation.is_off and not config.suites:
        raise UserError(
            "evaluation has no part that is on: nothing is measured. Set evaluation.retrieval, "
            "evaluation.nll or evaluation.retention, such as --evaluation.retrieval.samples 10, or "
            "a suite, such as --suite ruler"
        )
    for name in config.suites:
        read_suite(name, config.harness)
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
    if config.suites and config.harness.backend != "megatron":
        _check_rope(config, f"suite: {config.harness.backend}")
    parallel = filled_parallel(config.parallel)
    check_evaluation(config.evaluation)
    return replace(config, parallel=parallel)


def _check_generation(config: EvaluateConfig) -> None:
    if config.evaluation.retrieval is None:
        raise UserError(
            "generate (true) answers the questions of evaluation.retrieval, which is null. Set it, "
            "or leave generate out"
        )
    _check_rope(config, "generate (true): transformers")


def _check_rope(config: EvaluateConfig, reader: str) -> None:
    for key in ("rope_theta", "rope_scaling"):
        if getattr(config, key) is not None:
            raise UserError(
                f"{reader} reads the model as its folder says, without {key}. Leave {key} out, or "
                "put it into the folder's config.json"
            )


def check_evaluate_world(config: EvaluateConfig, world_size: int) -> None:
    """Refuses a number of processes that the parallel sizes do not divide, or cannot be used."""
    in_one = config.suites and config.harness.backend != "megatron"
    if config.compare or config.generate or in_one:
        if world_size > 1:
            key = "compare" if config.compare else "generate" if config.generate else "suite"
            value = "true" if key != "suite" else ", ".join(config.suites)
            raise UserError(
                f"{key} ({value}) runs in one process, and {world_size} were started. Leave out "
                f"--nproc, or {key}"
            )
        return
    data_parallel_size(config.parallel, world_size)
