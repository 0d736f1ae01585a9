"""The config that a model is built from, whichever command builds it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_longpo.config.names import Recompute, RecomputeModule
from megatron_longpo.config.train import LoraConfig, ModelConfig, ParallelConfig, TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """What of a command's config decides how a model is built."""

    model: ModelConfig
    parallel: ParallelConfig
    """Resolved."""
    recompute: Recompute = "none"
    recompute_modules: tuple[RecomputeModule, ...] | None = None
    recompute_layers: int | None = None
    """The three keys `train.recompute...`; a model without gradients ignores them."""
    offload_activations: bool = False
    """`train.offload_activations`, of the policy."""
    offload_reference: bool = False
    """`reference.offload`, of a reference beside the policy."""
    lora: LoraConfig | None = None
    """The policy's adapters; None = all of its weights train, or the model has none."""
    seed: int = 0
    """Seed of the adapters' first weights."""


def training_build_config(config: TrainConfig) -> BuildConfig:
    """Returns what `longpo train` and `longpo reference` build from; `config` is resolved."""
    return BuildConfig(
        model=config.model,
        parallel=config.parallel,
        recompute=config.train.recompute,
        recompute_modules=config.train.recompute_modules,
        recompute_layers=config.train.recompute_layers,
        offload_activations=config.train.offload_activations,
        offload_reference=config.reference.offload,
        lora=config.lora,
        seed=config.train.seed,
    )
