"""What a run starts from: the folders of its models, its objective and its rows, all checked."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from checkpoints_convert.hf_folder import local_hf_folder
from checkpoints_convert.lora_record import LoraRecord
from megatron_longpo.config.train import TrainConfig
from megatron_longpo.data.rows.dataset import RowDataset, open_rows
from megatron_longpo.data.trees.catalog import PairCatalog, RowLimits
from megatron_longpo.data.trees.reference_logps import ReferenceLogps
from megatron_longpo.data.trees.tree import TreeSettings
from megatron_longpo.engine.degrees import check_every_rank_has_layers, check_split, stage_split
from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import Architecture, read_architecture
from megatron_longpo.model.lora import LoraSettings
from megatron_longpo.objectives import Objective, build_objective


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSources:
    """Policy and reference as folders and architectures; the reference None where unused."""

    policy_folder: str
    policy: Architecture
    reference_folder: str | None
    reference: Architecture | None
    cached_folder: str | None = None
    """The reference whose log-probabilities come from a cache: it is never built to train."""
    cached: Architecture | None = None
    base_folder: str | None = None
    """The model that retention is measured against where no reference stays in memory: it is asked
    once, before the policy is built."""
    base: Architecture | None = None
    lora: LoraRecord | None
    """The policy's adapters, None where all of its weights train."""

    @property
    def shares_weights(self) -> bool:
        """Whether the reference is the policy without its adapters, and needs no second model."""
        if self.lora is None or self.reference_folder is None:
            return False
        return Path(self.reference_folder).resolve() == Path(self.policy_folder).resolve()

    @property
    def built(self) -> list[Architecture]:
        """The models that training builds."""
        return [self.policy, *filter(None, [self.reference, self.base])]

    @property
    def scorer(self) -> Architecture | None:
        """The reference, whether it is there or in a cache."""
        return self.reference or self.cached


def read_models(config: TrainConfig) -> ModelSources:
    """Finds and checks both models without loading weights.

    The policy takes the settings' RoPE and positions; the reference keeps its own.
    """
    model = config.model
    policy_folder = local_hf_folder(model.hf_path)
    policy = read_architecture(
        policy_folder,
        rope_theta=model.rope_theta,
        rope_scaling=model.rope_scaling,
        max_position_embeddings=model.max_position_embeddings,
    )
    if (
        config.data.max_length > policy.max_position_embeddings
        and model.rope_theta is None
        and model.rope_scaling is None
    ):
        warnings.warn(
            f"data.max_length ({config.data.max_length}) exceeds the model's positions "
            f"({policy.max_position_embeddings}) and its RoPE is unchanged: set model.rope_theta "
            "and model.max_position_embeddings, or lower data.max_length",
            stacklevel=2,
        )
    folder = arch = None
    needs_base = config.evaluation.retention is not None
    if config.reference.mode != "none" or needs_base:
        assert config.reference.hf_path is not None, "settings are resolved"
        folder = local_hf_folder(config.reference.hf_path)
        arch = read_architecture(folder)
    lora = None
    if config.lora is not None:
        settings = LoraSettings(**dataclasses.asdict(config.lora))
        lora = LoraRecord.of(settings, base=model.hf_path, base_folder=policy_folder)
    mode = config.reference.mode
    is_online, is_cached = mode == "online", mode == "cached"
    is_asked_once = needs_base and not is_online
    return ModelSources(
        policy_folder=policy_folder,
        policy=policy,
        reference_folder=folder if is_online else None,
        reference=arch if is_online else None,
        cached_folder=folder if is_cached else None,
        cached=arch if is_cached else None,
        base_folder=folder if is_asked_once else None,
        base=arch if is_asked_once else None,
        lora=lora,
    )


def check_layout(config: TrainConfig, sources: ModelSources) -> None:
    """Refuses what the settings ask of models that cannot be split, compared or moved so."""
    if (
        make_objective(config).needs.divergence is not None
        and sources.reference is not None
        and sources.reference.vocab_size != sources.policy.vocab_size
    ):
        raise UserError(
            f"reference.hf_path ({sources.reference_folder}): its vocabulary has "
            f"{sources.reference.vocab_size} tokens, the policy's {sources.policy.vocab_size}; "
            f"objective.name {config.objective.name} compares next-token distributions, so use a "
            "reference with the policy's tokenizer"
        )
    base = sources.reference or sources.base
    if (
        config.evaluation.retention is not None
        and base is not None
        and base.vocab_size != sources.policy.vocab_size
    ):
        raise UserError(
            f"reference.hf_path ({config.reference.hf_path}): its vocabulary has "
            f"{base.vocab_size} tokens, the policy's {sources.policy.vocab_size}; "
            "evaluation.retention compares next-token distributions, so use a reference with the "
            "policy's tokenizer, or set evaluation.retention null"
        )
    if config.reference.offload and sources.shares_weights:
        raise UserError(
            "reference.offload (true): with lora the reference is the policy with its adapters "
            "off, and has no weights of its own. Remove it"
        )
    split = stage_split(config, sources.policy)
    if sources.lora is not None:
        check_every_rank_has_layers(config, split)
    check_split(config, sources.built)


def make_objective(config: TrainConfig) -> Objective:
    """The objective of resolved settings."""
    settings = dataclasses.asdict(config.objective)
    return build_objective(
        settings.pop("name"), {**settings, "reference_context": config.reference.context}
    )


def read_pairs(
    config: TrainConfig,
    path: str,
    sources: ModelSources,
    objective: Objective,
    *,
    progress: Callable[[Iterable[int]], Iterable[int]],
    find_logps: Callable[[RowDataset], ReferenceLogps] | None = None,
) -> PairCatalog:
    """Opens rows and checks and measures every one of them.

    `find_logps` gives the reference's sums of the rows, which then are not packed for it.
    """
    dataset = open_rows(path)
    needs, scorer = objective.needs, sources.scorer
    settings = TreeSettings(
        policy=needs.policy,
        reference=needs.reference if scorer is not None else (),
        packs_reference=find_logps is None,
        nll=needs.nll,
        divergence=needs.divergence,
        share_prefix=config.data.share_prefix,
    )
    reference_positions = None
    vocab_size = sources.policy.vocab_size
    if scorer is not None:
        reference_positions = scorer.max_position_embeddings
        vocab_size = min(vocab_size, scorer.vocab_size)
    return PairCatalog(
        dataset,
        limits=RowLimits(
            vocab_size=vocab_size,
            max_length=config.data.max_length,
            too_long=config.data.too_long,
            max_reference_length=reference_positions if settings.reads_short_rows else None,
        ),
        settings=settings,
        reference_logps=None if find_logps is None else find_logps(dataset),
        per_turn=objective.compared is not None and config.objective.turns == "per_turn",
        progress=progress,
    )
