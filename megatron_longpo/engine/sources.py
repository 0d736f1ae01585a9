"""Finds and checks a run's models, objective and rows."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from checkpoints_convert.hf_folder import local_hf_folder
from checkpoints_convert.lora_record import LoraRecord
from megatron_longpo.config.train import TrainConfig
from megatron_longpo.data.rows.dataset import RowDataset, open_rows
from megatron_longpo.data.rows.splits import EVALUATION_SPLITS
from megatron_longpo.data.trees.catalog import PairCatalog, RowLimits
from megatron_longpo.data.trees.reference_logps import ReferenceLogps
from megatron_longpo.data.trees.tree import TreeConfig
from megatron_longpo.engine.degrees import check_every_rank_has_layers, check_split, stage_split
from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import Architecture, read_architecture
from megatron_longpo.objectives import Objective, build_objective

ScorerRole = Literal["online", "cached", "base"]
"""online: scored in the policy's pass. cached: its log-probs are read from a cache, and it is never
built to train. base: asked once for retention, before the policy is built."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerSource:
    """A frozen model that the policy is compared with."""

    role: ScorerRole
    folder: str
    """Hugging Face folder."""
    arch: Architecture


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSources:
    """The models of a run as folders and architectures."""

    policy_folder: str
    policy: Architecture
    scorers: tuple[ScorerSource, ...] = ()
    """At most one a role."""
    lora: LoraRecord | None = None
    """The policy's adapters, None where all of its weights train."""

    def scorer(self, role: ScorerRole) -> ScorerSource | None:
        """Returns the model with this role, None where the run has none."""
        return next((scorer for scorer in self.scorers if scorer.role == role), None)

    @property
    def reference(self) -> ScorerSource | None:
        """The reference of the objective, scored online or cached."""
        return self.scorer("online") or self.scorer("cached")

    @property
    def online_arch(self) -> Architecture | None:
        """The reference that runs beside the policy."""
        online = self.scorer("online")
        return None if online is None else online.arch

    @property
    def shares_weights(self) -> bool:
        """Whether the reference is the policy without its adapters, and needs no second model."""
        online = self.scorer("online")
        if self.lora is None or online is None:
            return False
        return Path(online.folder).resolve() == Path(self.policy_folder).resolve()

    @property
    def built(self) -> list[Architecture]:
        """The models that training builds."""
        return [self.policy, *(s.arch for s in self.scorers if s.role != "cached")]


def read_models(config: TrainConfig) -> ModelSources:
    """Finds and checks the run's models without loading weights.

    The policy takes RoPE and positions from the config; the reference keeps its own.
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
    return ModelSources(
        policy_folder=policy_folder,
        policy=policy,
        scorers=_read_scorers(config),
        lora=None
        if config.lora is None
        else LoraRecord.of(config.lora, base=model.hf_path, base_folder=policy_folder),
    )


def _read_scorers(config: TrainConfig) -> tuple[ScorerSource, ...]:
    """Returns the reference's folder and architecture in every role that the run has for it."""
    roles: list[ScorerRole] = []
    if config.reference.mode in ("online", "cached"):
        roles.append(config.reference.mode)
    if config.evaluation.retention is not None and config.reference.mode != "online":
        roles.append("base")
    if not roles:
        return ()
    assert config.reference.hf_path is not None, "the config is resolved"
    folder = local_hf_folder(config.reference.hf_path)
    arch = read_architecture(folder)
    return tuple(ScorerSource(role=role, folder=folder, arch=arch) for role in roles)


def check_layout(config: TrainConfig, sources: ModelSources) -> None:
    """Raises a UserError for models that cannot be split, compared or moved as `config` asks."""
    online = sources.scorer("online")
    if (
        make_objective(config).needs.divergence is not None
        and online is not None
        and online.arch.vocab_size != sources.policy.vocab_size
    ):
        raise UserError(
            f"reference.hf_path ({online.folder}): its vocabulary has "
            f"{online.arch.vocab_size} tokens, the policy's {sources.policy.vocab_size}; "
            f"objective.name {config.objective.name} compares next-token distributions, so use a "
            "reference with the policy's tokenizer"
        )
    base = online or sources.scorer("base")
    if (
        config.evaluation.retention is not None
        and base is not None
        and base.arch.vocab_size != sources.policy.vocab_size
    ):
        raise UserError(
            f"reference.hf_path ({config.reference.hf_path}): its vocabulary has "
            f"{base.arch.vocab_size} tokens, the policy's {sources.policy.vocab_size}; "
            "evaluation.retention compares next-token distributions, so use a reference with the "
            "policy's tokenizer, or set evaluation.retention null"
        )
    if config.reference.offload and sources.shares_weights:
        raise UserError(
            "reference.offload (true): with lora the reference is the policy with its adapters "
            "off, and has no weights of its own. Remove it"
        )
    split = stage_split(config.parallel, sources.policy)
    if sources.lora is not None:
        check_every_rank_has_layers(config.parallel, split)
    check_split(config.parallel, sources.built)


def make_objective(config: TrainConfig) -> Objective:
    """Returns the objective of a resolved config."""
    keys = dataclasses.asdict(config.objective)
    return build_objective(
        keys.pop("name"), {**keys, "reference_context": config.reference.context}
    )


def read_pairs(
    config: TrainConfig,
    path: str,
    sources: ModelSources,
    objective: Objective,
    *,
    progress: Callable[[Iterable[int]], Iterable[int]],
    find_logps: Callable[[RowDataset], ReferenceLogps] | None = None,
    for_evaluation: bool = False,
) -> PairCatalog:
    """Opens a data set and checks and measures every row.

    If `find_logps` is given, it returns the reference's sums of the rows, and the rows are not
    packed for the reference. `for_evaluation` reads the split to evaluate on, not to train on.
    """
    if for_evaluation:
        dataset = open_rows(path, split=config.data.eval_split, default_splits=EVALUATION_SPLITS)
    else:
        dataset = open_rows(path, split=config.data.split)
    needs, reference = objective.needs, sources.reference
    tree_config = TreeConfig(
        policy=needs.policy,
        reference=needs.reference if reference is not None else (),
        packs_reference=find_logps is None,
        nll=needs.nll,
        divergence=needs.divergence,
        share_prefix=config.data.share_prefix,
    )
    reference_positions = None
    vocab_size = sources.policy.vocab_size
    if reference is not None:
        reference_positions = reference.arch.max_position_embeddings
        vocab_size = min(vocab_size, reference.arch.vocab_size)
    return PairCatalog(
        dataset,
        limits=RowLimits(
            vocab_size=vocab_size,
            max_length=config.data.max_length,
            too_long=config.data.too_long,
            max_reference_length=reference_positions if tree_config.reads_short_rows else None,
        ),
        tree_config=tree_config,
        reference_logps=None if find_logps is None else find_logps(dataset),
        per_turn=objective.compared is not None and config.objective.turns == "per_turn",
        progress=progress,
    )
