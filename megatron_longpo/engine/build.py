"""Builds policy and reference as this rank holds them, with their weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import unwrap_model

from checkpoints_convert.gpt_weights import load_hf_weights
from megatron_longpo.engine.build_config import BuildConfig
from megatron_longpo.engine.degrees import heads_per_rank, stage_split
from megatron_longpo.engine.sources import ModelSources, ScorerSource
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
    config: BuildConfig,
    sources: ModelSources,
    groups: Groups,
    *,
    say: Callable[[str], None] = lambda line: None,
    write_weights: WeightsWriter = load_hf_weights,
) -> list[Any]:
    """Returns this rank's chunks of the policy, each with its part of a reference, with weights.

    `say` is told which attention kernel and layers the policy runs on, and why no faster ones.
    `write_weights` fills every parameter of a model.
    """
    split = stage_split(config.parallel, sources.policy)
    activations = ActivationOffload(groups.device) if config.offload_activations else None
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
    if config.lora is not None:
        for policy in policies:
            attach_adapters(policy.gpt, config.lora, seed=config.seed, tensor_group=groups.tensor)
    online = sources.scorer("online")
    references: list[ChunkModel] | list[None] = [None] * len(policies)
    if online is not None and sources.shares_weights:
        references = [_chunk_of(policy.gpt, online.arch, groups) for policy in policies]
    elif online is not None:
        references = _chunks(
            config,
            online.arch,
            online.folder,
            groups,
            split=like_split(online.arch.num_layers, split),
            trainable=False,
            write_weights=write_weights,
        )
    model = [
        _ready(
            LongPOModel(
                policy=policy,
                reference=reference,
                tensor_group=groups.tensor,
                context_group=groups.context,
                activations=activations,
            ),
            config,
            groups,
        )
        for policy, reference in zip(policies, references, strict=True)
    ]
    if config.offload_reference:
        for chunk in model:
            unwrap_model(chunk).offload_reference()
    return model


def build_scorer(
    config: BuildConfig,
    arch: Architecture,
    folder: str,
    groups: Groups,
    *,
    split: Split,
    say: Callable[[str], None] = lambda line: None,
    write_weights: WeightsWriter = load_hf_weights,
) -> list[Any]:
    """Returns this rank's chunks of a model that only scores: `LongPOModel`s without a reference.

    `split` gives the model's layers on each pipeline stage.
    """
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
    model = [
        LongPOModel(
            policy=chunk, reference=None, tensor_group=groups.tensor, context_group=groups.context
        )
        for chunk in chunks
    ]
    for chunk in model:
        chunk.requires_grad_(False)
        chunk.eval()
    return [_ready(chunk, config, groups) for chunk in model]


def build_alone(
    config: BuildConfig,
    source: ScorerSource,
    sources: ModelSources,
    groups: Groups,
    *,
    say: Callable[[str], None] = lambda line: None,
    write_weights: WeightsWriter = load_hf_weights,
) -> list[Any]:
    """Returns this rank's chunks of one of a run's frozen models alone, split as the policy is."""
    split = like_split(source.arch.num_layers, stage_split(config.parallel, sources.policy))
    return build_scorer(
        config,
        source.arch,
        source.folder,
        groups,
        split=split,
        say=say,
        write_weights=write_weights,
    )


def _ready(model: LongPOModel, config: BuildConfig, groups: Groups) -> Any:
    """Returns the model on this rank's device and in its dtype, with the first rank's weights."""
    model.to(groups.device)
    ready: Any = Float16Module(model.config, model) if config.model.dtype == "bf16" else model
    # All data-parallel ranks read the same weights, but a rank may have misread them.
    same_shards = groups.data_and_context
    for parameter in ready.parameters():
        dist.broadcast(parameter.data, src=dist.get_global_rank(same_shards, 0), group=same_shards)
    return ready


def _chunks(
    config: BuildConfig,
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
    """Returns this rank's pipeline chunks of one model, with their weights."""
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
        recompute=config.recompute,
        recompute_modules=config.recompute_modules,
        recompute_layers=config.recompute_layers,
        trainable=trainable,
        layers=layers.kind,
    )
    core_attention = functools.partial(
        TreeAttention,
        kernel=kernel.kernel,
        exchange=exchange,
        keeps_results=trainable and config.recompute == "all_but_attention",
        offload=activations,
    )
    keeps_later_layers = (
        trainable and config.recompute == "selective" and config.recompute_layers is not None
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
        if keeps_later_layers:
            keep_whole(gpt.decoder.layers[config.recompute_layers :])
        write_weights(gpt, arch, folder)
        chunks.append(_chunk_of(gpt, arch, groups))
    return chunks


def _chunk_of(gpt: GPTModel, arch: Architecture, groups: Groups) -> ChunkModel:
    return ChunkModel(
        gpt=gpt,
        inv_freq=inverse_frequencies(arch).to(groups.device),
        vocab_size=arch.vocab_size,
    )
