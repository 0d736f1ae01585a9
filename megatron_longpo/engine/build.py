"""Builds policy and reference as this rank holds them, with their weights, wrapped for training."""

from __future__ import annotations

import functools
from collections.abc import Callable
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

from checkpoints_convert.gpt_weights import load_hf_weights
from megatron_longpo.config.train import TrainConfig
from megatron_longpo.engine.degrees import heads_per_rank, stage_split
from megatron_longpo.engine.sources import ModelSources
from megatron_longpo.model.activation_offload import ActivationOffload
from megatron_longpo.model.architectures import Architecture
from megatron_longpo.model.attention.kernel_choice import choose_kernel
from megatron_longpo.model.attention.tree_attention import TreeAttention
from megatron_longpo.model.layer_specs import accumulate_in_main_grad, choose_layers, keep_whole
from megatron_longpo.model.longpo_model import ChunkModel, LongPOModel
from megatron_longpo.model.lora import attach_adapters
from megatron_longpo.model.rope import inverse_frequencies
from megatron_longpo.model.spec import DTYPES, build_gpt, transformer_config
from megatron_longpo.parallel.context import make_exchange
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.parallel.stages import Split, like_split

WeightsWriter = Callable[[Any, Architecture, str], None]
"""Takes this rank's model, its architecture and its Hugging Face folder."""


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
    activations = ActivationOffload(groups.device) if config.train.offload_activations else None
    policies = _chunks(
        config,
        sources.policy,
        sources.policy_folder,
        groups,
        split=split,
        trainable=True,
        activations=activations,
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
        _wrapped(config, policy, reference, groups, activations, is_first=index == 0)
        for index, (policy, reference) in enumerate(zip(policies, references, strict=True))
    ]


def _wrapped(
    config: TrainConfig,
    policy: ChunkModel,
    reference: ChunkModel | None,
    groups: Groups,
    activations: ActivationOffload | None,
    *,
    is_first: bool,
) -> Any:
    """A chunk of both models in Megatron's DDP."""
    model: Any = LongPOModel(
        policy=policy,
        reference=reference,
        tensor_group=groups.tensor,
        context_group=groups.context,
        activations=activations,
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
    split = like_split(sources.cached.num_layers, stage_split(config, sources.policy))
    return build_scorer(config, sources.cached, sources.cached_folder, groups, split=split, say=say)


def build_base(
    config: TrainConfig,
    sources: ModelSources,
    groups: Groups,
    *,
    write_weights: WeightsWriter = load_hf_weights,
) -> list[Any]:
    """The base model alone, to be asked for retention before the policy is built."""
    assert sources.base is not None and sources.base_folder is not None
    split = like_split(sources.base.num_layers, stage_split(config, sources.policy))
    return build_scorer(
        config, sources.base, sources.base_folder, groups, split=split, write_weights=write_weights
    )


def build_scorer(
    config: TrainConfig,
    arch: Architecture,
    folder: str,
    groups: Groups,
    *,
    split: Split,
    say: Callable[[str], None] = lambda line: None,
    write_weights: WeightsWriter = load_hf_weights,
) -> list[Any]:
    """This rank's chunks of a model that only scores, as `LongPOModel`s without a reference."""
    chunks = _chunks(
        config,
        arch,
        folder,
        groups,
        split=split,
        trainable=False,
        say=say,
        write_weights=write_weights,
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
    activations: ActivationOffload | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[ChunkModel]:
    """This rank's pipeline chunks of one model, with their weights."""
    sizes = groups.sizes
    dtype = config.model.dtype
    recompute, recompute_layers = config.train.recompute, config.train.recompute_layers
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
        recompute=recompute,
        recompute_modules=config.train.recompute_modules,
        recompute_layers=recompute_layers,
        trainable=trainable,
        layers=layers.kind,
    )
    core_attention = functools.partial(
        TreeAttention,
        kernel=kernel.kernel,
        exchange=exchange,
        keeps_results=trainable and recompute == "all_but_attention",
        offload=activations,
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
        if trainable and recompute == "selective" and recompute_layers is not None:
            keep_whole(gpt.decoder.layers[recompute_layers:])
        write_weights(gpt, arch, folder)
        chunks.append(_chunk_of(gpt, arch, groups))
    return chunks


def _chunk_of(gpt: GPTModel, arch: Architecture, groups: Groups) -> ChunkModel:
    return ChunkModel(
        gpt=gpt,
        inv_freq=inverse_frequencies(arch).to(groups.device),
        vocab_size=arch.vocab_size,
    )
