"""Rules between the settings of `train`, and the defaults that depend on other settings.

A message says field, value, rule and remedy in one line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal

from megatron_longpo.config_fields import check_limits
from megatron_longpo.errors import UserError

if TYPE_CHECKING:
    # Only for types: config.py imports this file.
    from megatron_longpo.config import (
        ObjectiveConfig,
        ParallelConfig,
        ReferenceConfig,
        TrainConfig,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveDefaults:
    """What an objective's name decides where the user does not."""

    beta: float
    """0 where the objective has no preference term."""
    preference_weight: float
    nll_weight: float
    nll_scope: Literal["chosen_row", "chosen_answers"]
    context: Literal["short", "long"]
    mode: Literal["online", "none"]

    @property
    def has_preference(self) -> bool:
        return self.beta > 0


OBJECTIVE_DEFAULTS = {
    "longpo": ObjectiveDefaults(
        beta=0.01,
        preference_weight=0.01,
        nll_weight=1.0,
        nll_scope="chosen_row",
        context="short",
        mode="online",
    ),
    "dpo": ObjectiveDefaults(
        beta=0.1,
        preference_weight=1.0,
        nll_weight=0.0,
        nll_scope="chosen_answers",
        context="long",
        mode="online",
    ),
    "sft": ObjectiveDefaults(
        beta=0.0,
        preference_weight=0.0,
        nll_weight=1.0,
        nll_scope="chosen_answers",
        context="long",
        mode="none",
    ),
    "sft_rejected": ObjectiveDefaults(
        beta=0.0,
        preference_weight=0.0,
        nll_weight=1.0,
        nll_scope="chosen_answers",
        context="long",
        mode="none",
    ),
}


def resolve(config: TrainConfig) -> TrainConfig:
    """Checks the settings and fills what depends on others; resolving twice changes nothing."""
    check_limits(config)
    _check_available(config)
    defaults = OBJECTIVE_DEFAULTS[config.objective.name]
    resolved = replace(
        config,
        objective=_filled_objective(config.objective, defaults),
        reference=_filled_reference(config.reference, defaults, config.model.hf_path),
        parallel=_filled_parallel(config.parallel),
        checkpoint=replace(
            config.checkpoint,
            dir=config.checkpoint.dir or str(PurePath(config.logging.dir) / "checkpoints"),
        ),
    )
    _check_objective(resolved, defaults)
    _check_rest(resolved)
    return resolved


def check_world(config: TrainConfig, world_size: int) -> int:
    """Returns the data-parallel size, or raises where the sizes do not fit the world."""
    parallel = config.parallel
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    sizes = (
        f"parallel.tensor ({parallel.tensor}) x parallel.pipeline ({parallel.pipeline}) x "
        f"parallel.context ({parallel.context}) = {model_ranks}"
    )
    if world_size % model_ranks:
        raise UserError(
            f"{sizes} must divide the number of processes ({world_size}). Lower one of them, or "
            f"start {max(1, world_size // model_ranks) * model_ranks} processes"
        )
    data_ranks = world_size // model_ranks
    pairs = config.train.global_batch_pairs
    if data_ranks > pairs:
        raise UserError(
            f"train.global_batch_pairs ({pairs}) must be at least the data-parallel size "
            f"({world_size} processes / {model_ranks} = {data_ranks}), or some ranks never see a "
            f"pair. Set it to {data_ranks}, or start {pairs * model_ranks} processes"
        )
    return data_ranks


def _check_available(config: TrainConfig) -> None:
    """Refuses what the settings already name and the code does not do yet."""
    parallel = config.parallel
    not_yet = {
        "reference.mode": (config.reference.mode, config.reference.mode == "cached", "online"),
        "reference.offload": (config.reference.offload, config.reference.offload, "false"),
        "parallel.virtual_pipeline": (
            parallel.virtual_pipeline,
            parallel.virtual_pipeline is not None,
            "null",
        ),
        "parallel.context_comm": (
            parallel.context_comm,
            parallel.context_comm == "a2a+all_gather",
            "all_gather",
        ),
        "parallel.context_inner": (
            parallel.context_inner,
            parallel.context_inner is not None,
            "null",
        ),
        "checkpoint.async_save": (
            config.checkpoint.async_save,
            config.checkpoint.async_save,
            "false",
        ),
        "lora": ("set", config.lora is not None, "null"),
    }
    for key, (value, is_asked, remedy) in not_yet.items():
        if is_asked:
            shown = str(value).lower() if isinstance(value, bool) else value
            raise UserError(f"{key} ({shown}) is not available yet. Use {remedy}")


def _filled_objective(objective: ObjectiveConfig, defaults: ObjectiveDefaults) -> ObjectiveConfig:
    def filled(value: float | None, default: float) -> float:
        return default if value is None else value

    return replace(
        objective,
        # An objective without a preference term has no beta, whatever a shared YAML says.
        beta=filled(objective.beta, defaults.beta) if defaults.has_preference else 0.0,
        preference_weight=filled(objective.preference_weight, defaults.preference_weight),
        nll_weight=filled(objective.nll_weight, defaults.nll_weight),
        nll_scope=objective.nll_scope or defaults.nll_scope,
    )


def _filled_reference(
    reference: ReferenceConfig, defaults: ObjectiveDefaults, model_path: str
) -> ReferenceConfig:
    return replace(
        reference,
        mode=reference.mode or defaults.mode,
        hf_path=reference.hf_path or model_path,
        context=reference.context or defaults.context,
    )


def _filled_parallel(parallel: ParallelConfig) -> ParallelConfig:
    if parallel.sequence is None:
        return replace(parallel, sequence=parallel.tensor > 1)
    if parallel.sequence and parallel.tensor == 1:
        raise UserError(
            "parallel.sequence (true) splits work over tensor-parallel ranks, and parallel.tensor "
            "is 1. Use false, or leave it out"
        )
    return parallel


def _check_objective(config: TrainConfig, defaults: ObjectiveDefaults) -> None:
    """`config` is filled: nothing of the objective is None."""
    objective = config.objective
    if not defaults.has_preference:
        _check_sft(config)
        return
    if not objective.beta:
        raise UserError(
            f"objective.beta (0) must be above 0 for {objective.name}. Its default is "
            f"{defaults.beta:g}"
        )
    if not objective.preference_weight and not objective.nll_weight:
        raise UserError(
            "objective.preference_weight (0) and objective.nll_weight (0): nothing is left to "
            "train. Set one of them above 0"
        )


def _check_sft(config: TrainConfig) -> None:
    objective, name = config.objective, config.objective.name
    if objective.preference_weight:
        raise UserError(
            f"objective.preference_weight ({objective.preference_weight:g}): {name} has no "
            "preference term. Remove it, or use objective.name longpo or dpo"
        )
    if not objective.nll_weight:
        raise UserError(f"objective.nll_weight (0): {name} has no other term. Remove it")
    if name == "sft_rejected" and objective.nll_scope != "chosen_answers":
        raise UserError(
            f"objective.nll_scope ({objective.nll_scope}): sft_rejected trains the rejected "
            "answers alone. Remove it"
        )
    if config.reference.mode != "none":
        raise UserError(
            f"reference.mode ({config.reference.mode}): {name} uses no reference. Remove it"
        )


def _check_rest(config: TrainConfig) -> None:
    optimizer, data, train = config.optimizer, config.data, config.train
    if optimizer.min_lr > optimizer.lr:
        raise UserError(
            f"optimizer.min_lr ({optimizer.min_lr:g}) must not exceed optimizer.lr "
            f"({optimizer.lr:g}). Lower it, or raise optimizer.lr"
        )
    if train.eval_interval and data.eval_path is None:
        raise UserError(
            f"train.eval_interval ({train.eval_interval}) needs rows to evaluate on. Set "
            "data.eval_path, or train.eval_interval 0"
        )
    if config.reference.cache_path is not None:
        raise UserError(
            f"reference.cache_path ({config.reference.cache_path}) is read where reference.mode is "
            f"cached, and it is {config.reference.mode}. Remove it"
        )
