"""Builds what a run needs from its settings: architectures, pairs, model, optimizer."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import unwrap_model

from checkpoints_convert.hf_folder import local_hf_folder
from checkpoints_convert.hf_weights import load_hf_weights
from checkpoints_convert.lora_record import LoraRecord
from megatron_longpo.config import TrainConfig
from megatron_longpo.data.catalog import PairCatalog, RowLimits
from megatron_longpo.data.reference_logps import ReferenceLogps
from megatron_longpo.data.rows import RowDataset, open_rows
from megatron_longpo.data.tree import TreeSettings
from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import Architecture, read_architecture
from megatron_longpo.model.attention import TreeAttention
from megatron_longpo.model.kernel_choice import choose_kernel
from megatron_longpo.model.layer_specs import accumulate_in_main_grad, choose_layers
from megatron_longpo.model.longpo_model import ChunkModel, LongPOModel
from megatron_longpo.model.lora import LoraSettings, attach_adapters
from megatron_longpo.model.rope import inverse_frequencies
from megatron_longpo.model.spec import DTYPES, build_gpt, transformer_config
from megatron_longpo.objectives import Objective, build_objective
from megatron_longpo.parallel.context import make_exchange
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.parallel.stages import Split, like_split
from megatron_longpo.training.degrees import (
    check_every_rank_has_layers,
    check_split,
    heads_per_rank,
    stage_split,
)

WeightsWriter = Callable[[Any, Architecture, str], None]
"""Takes this rank's model, its architecture and its Hugging Face folder."""


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
        return [self.policy, *filter(None, [self.reference])]

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
    if config.reference.mode != "none":
        assert config.reference.hf_path is not None, "settings are resolved"
        folder = local_hf_folder(config.reference.hf_path)
        arch = read_architecture(folder)
    lora = None
    if config.lora is not None:
        settings = LoraSettings(**dataclasses.asdict(config.lora))
        lora = LoraRecord.of(settings, base=model.hf_path, base_folder=policy_folder)
    is_online = config.reference.mode == "online"
    return ModelSources(
        policy_folder=policy_folder,
        policy=policy,
        reference_folder=folder if is_online else None,
        reference=arch if is_online else None,
        cached_folder=None if is_online else folder,
        cached=None if is_online else arch,
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


def build_model(
    config: TrainConfig,
    sources: ModelSources,
    groups: Groups,
    *,
    say: Callable[[str], None] = lambda line: None,
    write_weights: WeightsWriter = load_hf_weights,
) -> list[Any]:
    """This rank's chunks with their weights, wrapped by Megatron's DDP.

    `say` is told which attention kernel and layers the policy runs on, and why no faster ones.
    `write_weights` fills every parameter of a model.
    """
    split = stage_split(config, sources.policy)
    policies = _chunks(
        config,
        sources.policy,
        sources.policy_folder,
        groups,
        split=split,
        trainable=True,
        say=say,
        write_weights=write_weights,
    )
    if sources.lora is not None:
        for policy in policies:
            attach_adapters(
                policy.gpt,
                sources.lora.settings,
                seed=config.train.seed,
                tensor_group=groups.tensor,
            )
    references: list[ChunkModel] | list[None] = [None] * len(policies)
    if sources.reference is not None and sources.shares_weights:
        references = [_chunk_of(policy.gpt, sources.reference, groups) for policy in policies]
    elif sources.reference is not None:
        assert sources.reference_folder is not None
        references = _chunks(
            config,
            sources.reference,
            sources.reference_folder,
            groups,
            split=like_split(sources.reference.num_layers, split),
            trainable=False,
            write_weights=write_weights,
        )
    return [
        _wrapped(config, policy, reference, groups, is_first=index == 0)
        for index, (policy, reference) in enumerate(zip(policies, references, strict=True))
    ]


def _wrapped(
    config: TrainConfig,
    policy: ChunkModel,
    reference: ChunkModel | None,
    groups: Groups,
    *,
    is_first: bool,
) -> Any:
    """A chunk of both models in Megatron's DDP."""
    model: Any = LongPOModel(
        policy=policy, reference=reference, tensor_group=groups.tensor, context_group=groups.context
    )
    model = _placed(config, model, groups)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.optimizer.grad_dtype == "fp32",
        use_distributed_optimizer=config.optimizer.distributed,
        overlap_grad_reduce=config.optimizer.overlap_grad_reduce,
        overlap_param_gather=config.optimizer.overlap_param_gather,
        average_in_collective=False,
    )
    # Communication of later chunks overlaps with the first's compute as it is.
    wrapped = DistributedDataParallel(
        model.config, ddp_config, model, disable_bucketing=not is_first
    )
    # All data-parallel ranks read the same weights, but a rank may have misread them.
    wrapped.broadcast_params()
    if config.reference.offload:
        unwrap_model(wrapped).offload_reference()
    return wrapped


def build_reference(
    config: TrainConfig,
    sources: ModelSources,
    groups: Groups,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> list[Any]:
    """The reference alone, where the policy stands otherwise: what `longpo reference` runs."""
    assert sources.cached is not None and sources.cached_folder is not None
    chunks = _chunks(
        config,
        sources.cached,
        sources.cached_folder,
        groups,
        split=like_split(sources.cached.num_layers, stage_split(config, sources.policy)),
        trainable=False,
        say=say,
        write_weights=load_hf_weights,
    )
    return [_scorer(config, chunk, groups) for chunk in chunks]


def _scorer(config: TrainConfig, chunk: ChunkModel, groups: Groups) -> Any:
    """A chunk of a model that only scores."""
    model: Any = LongPOModel(
        policy=chunk, reference=None, tensor_group=groups.tensor, context_group=groups.context
    )
    model.requires_grad_(False)
    model.eval()
    placed = _placed(config, model, groups)
    # As Megatron's DDP does for a model that trains: one rank's reading is everyone's.
    same_shards = groups.data_and_context
    for parameter in placed.parameters():
        dist.broadcast(parameter, src=dist.get_global_rank(same_shards, 0), group=same_shards)
    return placed


def _placed(config: TrainConfig, model: Any, groups: Groups) -> Any:
    """The model on this rank's device, in its dtype."""
    model.to(groups.device)
    return Float16Module(model.config, model) if config.model.dtype == "bf16" else model


def connect(model: list[Any], optimizer: MegatronOptimizer) -> None:
    """Tells Megatron's schedule how to scale the loss, sum gradients and finish them."""
    for chunk in model:
        if chunk.ddp_config.overlap_grad_reduce:
            # Gradients are summed with the last microbatch's backward, not with every one's.
            waits = [other.no_sync for other in model]
            chunk.config.no_sync_func = waits if len(waits) > 1 else waits[0]
        chunk.config.grad_scale_func = optimizer.scale_loss
        chunk.config.finalize_model_grads_func = finalize_model_grads


def gather_parameters(model: list[Any]) -> None:
    """Makes this rank's weights those that the last optimizer step left.

    With `optimizer.overlap_param_gather` that is else done by the next forward: what reads weights
    in another way, such as a checkpoint, would find old ones.
    """
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _chunks(
    config: TrainConfig,
    arch: Architecture,
    folder: str,
    groups: Groups,
    *,
    split: Split,
    trainable: bool,
    write_weights: WeightsWriter,
    say: Callable[[str], None] = lambda line: None,
) -> list[ChunkModel]:
    """This rank's pipeline chunks of one model, with their weights."""
    sizes = groups.sizes
    dtype = config.model.dtype
    kernel = choose_kernel(
        config.model.attention_kernel,
        device=groups.device,
        dtype=DTYPES[dtype],
        head_dim=arch.head_dim,
    )
    layers = choose_layers(
        config.model.layers,
        device=groups.device,
        dtype=DTYPES[dtype],
        has_lora=config.lora is not None,
    )
    say(kernel.line)
    say(layers.line)
    heads, kv_heads = heads_per_rank(arch, sizes.tensor)
    exchange = make_exchange(groups, num_heads=heads, num_kv_heads=kv_heads)
    megatron_config = transformer_config(
        arch,
        dtype=dtype,
        tensor=sizes.tensor,
        pipeline=sizes.pipeline,
        virtual_pipeline=sizes.virtual_pipeline,
        stages=split,
        context=sizes.context,
        sequence=sizes.sequence,
        recompute=config.train.recompute,
        recompute_modules=config.train.recompute_modules,
        trainable=trainable,
        layers=layers.kind,
    )
    core_attention = functools.partial(
        TreeAttention,
        kernel=kernel.kernel,
        exchange=exchange,
        keeps_results=trainable and config.train.recompute == "all_but_attention",
    )
    chunks = []
    for index in range(sizes.virtual_pipeline or 1):
        gpt = build_gpt(
            arch,
            megatron_config,
            core_attention=core_attention,
            pre_process=groups.is_first_stage(index),
            post_process=groups.is_last_stage(index),
            vp_stage=None if sizes.virtual_pipeline is None else index,
            layers=layers.kind,
        )
        if trainable and layers.kind == "te":
            accumulate_in_main_grad(gpt)
        write_weights(gpt, arch, folder)
        chunks.append(_chunk_of(gpt, arch, groups))
    return chunks


def _chunk_of(gpt: GPTModel, arch: Architecture, groups: Groups) -> ChunkModel:
    return ChunkModel(
        gpt=gpt,
        inv_freq=inverse_frequencies(arch).to(groups.device),
        vocab_size=arch.vocab_size,
    )
