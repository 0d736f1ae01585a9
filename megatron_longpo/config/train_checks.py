"""Rules between the settings of `train`, and the defaults that depend on other settings.

A message says key, value, rule and remedy in one line. It begins with the key, so that the parser
can put file and line before it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePath

from megatron_longpo.config.evaluation import check_evaluation
from megatron_longpo.config.fields import check_limits
from megatron_longpo.config.objective_defaults import (
    OBJECTIVE_DEFAULTS,
    ObjectiveDefaults,
    check_objective,
    filled_objective,
)
from megatron_longpo.config.pipeline_layout import parse_layout
from megatron_longpo.config.train_sections import (
    OptimizerConfig,
    ParallelConfig,
    ReferenceConfig,
    TrainConfig,
)
from megatron_longpo.errors import UserError


def resolve(config: TrainConfig) -> TrainConfig:
    """Returns the config, checked and without nulls that depend on others; twice is the same."""
    check_limits(config)
    defaults = OBJECTIVE_DEFAULTS[config.objective.name]
    resolved = replace(
        config,
        objective=filled_objective(config.objective, defaults),
        reference=_filled_reference(config, defaults),
        parallel=filled_parallel(config.parallel),
        checkpoint=replace(
            config.checkpoint,
            dir=config.checkpoint.dir or str(PurePath(config.logging.dir) / "checkpoints"),
        ),
    )
    check_objective(resolved, defaults)
    _check_rest(resolved)
    return resolved


def resolve_reference(config: TrainConfig) -> TrainConfig:
    """Returns the config of `longpo reference`: that of the training run that reads its output."""
    reference = config.reference
    if reference.mode == "none":
        raise UserError(
            "reference.mode (none): longpo reference has nothing to compute. Use cached, for the "
            "training run too"
        )
    return resolve(replace(config, reference=replace(reference, mode="cached", offload=False)))


def check_world(config: TrainConfig, world_size: int) -> int:
    """Returns the data-parallel size, or raises where some rank would never see a pair."""
    data_ranks = data_parallel_size(config.parallel, world_size)
    pairs = config.train.global_batch_pairs
    if data_ranks > pairs:
        model_ranks = world_size // data_ranks
        raise UserError(
            f"train.global_batch_pairs ({pairs}) must be at least the data-parallel size "
            f"({world_size} processes / {model_ranks} = {data_ranks}), or some ranks never see a "
            f"pair. Set it to {data_ranks}, or start {pairs * model_ranks} processes"
        )
    return data_ranks


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Returns the data-parallel size, or raises where the sizes do not divide the world's."""
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
    return world_size // model_ranks


def _filled_reference(config: TrainConfig, defaults: ObjectiveDefaults) -> ReferenceConfig:
    reference = config.reference
    mode = reference.mode or defaults.mode
    cache_path = reference.cache_path
    if mode == "cached" and cache_path is None:
        cache_path = str(PurePath(config.logging.dir) / "reference_logps")
    return replace(
        reference,
        mode=mode,
        hf_path=reference.hf_path or config.model.hf_path,
        context=reference.context or defaults.context,
        cache_path=cache_path,
    )


def filled_parallel(parallel: ParallelConfig) -> ParallelConfig:
    """Checks the parallel sizes against each other and fills what depends on others."""
    if parallel.sequence and parallel.tensor == 1:
        raise UserError(
            "parallel.sequence (true) splits work over tensor-parallel ranks, and parallel.tensor "
            "is 1. Use false, or leave it out"
        )
    _check_context(parallel)
    return replace(
        parallel,
        sequence=parallel.tensor > 1 if parallel.sequence is None else parallel.sequence,
        virtual_pipeline=_filled_virtual_pipeline(parallel),
    )


def _check_context(parallel: ParallelConfig) -> None:
    inner, context = parallel.context_inner, parallel.context
    if inner is None:
        return
    if parallel.context_comm != "a2a+all_gather":
        raise UserError(
            f"parallel.context_inner ({inner}) is for parallel.context_comm a2a+all_gather, which "
            f"is {parallel.context_comm}. Remove it, or use a2a+all_gather"
        )
    if context % inner:
        fitting = ", ".join(str(size) for size in range(1, context + 1) if context % size == 0)
        raise UserError(
            f"parallel.context_inner ({inner}) must divide parallel.context ({context}). Use one "
            f"of {fitting}"
        )


def _filled_virtual_pipeline(parallel: ParallelConfig) -> int | None:
    """Returns the chunks per stage, None for one; if left out, as many as the layout has."""
    pipeline, virtual = parallel.pipeline, parallel.virtual_pipeline
    if parallel.pipeline_layout is not None:
        stages = len(parse_layout(parallel.pipeline_layout))
        expected = pipeline * (virtual or max(1, stages // pipeline))
        if stages != expected:
            times = "" if virtual is None else f" x parallel.virtual_pipeline ({virtual})"
            rule = "be a multiple of" if virtual is None else "equal"
            raise UserError(
                f"parallel.pipeline_layout ({parallel.pipeline_layout}): its {stages} stages must "
                f"{rule} parallel.pipeline ({pipeline}){times}. Change one of them"
            )
        virtual = stages // pipeline
    if virtual in (None, 1):
        return None
    if pipeline == 1:
        raise UserError(
            f"parallel.virtual_pipeline ({virtual}) interleaves the stages of a pipeline, and "
            "parallel.pipeline is 1. Use null, or raise parallel.pipeline"
        )
    return virtual


def _check_rest(config: TrainConfig) -> None:
    optimizer, data, train = config.optimizer, config.data, config.train
    if optimizer.min_lr > optimizer.lr:
        raise UserError(
            f"optimizer.min_lr ({optimizer.min_lr:g}) must not exceed optimizer.lr "
            f"({optimizer.lr:g}). Lower it, or raise optimizer.lr"
        )
    if optimizer.grad_dtype == "bf16" and config.model.dtype == "fp32":
        raise UserError(
            "optimizer.grad_dtype (bf16): gradients have model.dtype at least, and it is fp32. Use "
            "fp32, or model.dtype bf16"
        )
    _check_state_dtype(optimizer)
    for key in ("distributed", "overlap_grad_reduce"):
        if optimizer.overlap_param_gather and not getattr(optimizer, key):
            raise UserError(
                f"optimizer.overlap_param_gather (true) needs optimizer.{key}, which is false. Set "
                "it to true, or leave optimizer.overlap_param_gather out"
            )
    if train.recompute_modules is not None and train.recompute != "selective":
        raise UserError(
            f"train.recompute_modules ({', '.join(train.recompute_modules)}) is for "
            f"train.recompute selective, which is {train.recompute}. Remove it, or use selective"
        )
    if train.recompute_layers is not None and train.recompute == "none":
        raise UserError(
            f"train.recompute_layers ({train.recompute_layers}) says in how many layers something "
            "is recomputed, and train.recompute is none. Remove it, or use another train.recompute"
        )
    if train.recompute_modules == ():
        raise UserError(
            "train.recompute_modules ([]) leaves nothing to recompute. Name a module, or use "
            "train.recompute none"
        )
    if train.offload_activations and train.recompute == "selective":
        raise UserError(
            "train.offload_activations (true) is not for train.recompute selective, which drops "
            "tensors that it would still be moving. Use all_but_attention, full or none"
        )
    check_evaluation(config.evaluation)
    if train.eval_interval and data.eval_path is None and config.evaluation.is_off:
        raise UserError(
            f"train.eval_interval ({train.eval_interval}) needs something to evaluate. Set "
            "data.eval_path or a part of evaluation, or train.eval_interval 0"
        )
    if data.eval_split is not None and data.eval_path is None:
        raise UserError(
            f"data.eval_split ({data.eval_split}) needs data.eval_path. Set that, which may be "
            "data.path, or remove data.eval_split"
        )
    if config.lora is not None and len(set(config.lora.targets)) != len(config.lora.targets):
        raise UserError(
            f"lora.targets ({', '.join(config.lora.targets)}): a layer stands twice. Name each once"
        )
    if config.lora is not None and not config.lora.targets:
        raise UserError(
            "lora.targets ([]): nothing is left to train. Name a layer, or set lora null"
        )
    _check_reference_files(config.reference)


def _check_state_dtype(optimizer: OptimizerConfig) -> None:
    """Refuses decays that are too slow for averages in bf16.

    The last bit of bf16 is up to 2^-7 of a value, and rounding loses half of that. With a slower
    decay, an average of squares stays where one large gradient has put it.
    """
    if optimizer.state_dtype == "fp32":
        return
    decays = ("alpha",) if optimizer.name == "rmsprop" else ("beta1", "beta2")
    for key in decays:
        decay = getattr(optimizer, key)
        if decay > 1 - 2**-8:
            raise UserError(
                f"optimizer.{key} ({decay:g}) is too slow a decay for optimizer.state_dtype bf16, "
                "which would round it away. Use 0.996 or less, or state_dtype fp32"
            )


def _check_reference_files(reference: ReferenceConfig) -> None:
    if reference.cache_path is not None and reference.mode != "cached":
        raise UserError(
            f"reference.cache_path ({reference.cache_path}) is read where reference.mode is "
            f"cached, and it is {reference.mode}. Remove it, or set reference.mode cached"
        )
    if reference.offload and reference.mode != "online":
        raise UserError(
            "reference.offload (true) is for a reference that runs beside the policy, and "
            f"reference.mode is {reference.mode}. Remove it, or set reference.mode online"
        )
