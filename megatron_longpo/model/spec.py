"""The one place that builds Megatron's GPTModel and its config from an `Architecture`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_longpo.config.names import Dtype, LayerKind, Recompute, RecomputeModule
from megatron_longpo.config.pipeline_layout import parse_layout
from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import Architecture
from megatron_longpo.model.layer_specs import layer_spec, norm_class
from megatron_longpo.model.norm_recompute import mend_norm_recompute
from megatron_longpo.model.rope import attention_scale
from megatron_longpo.parallel.groups import megatron_groups
from megatron_longpo.parallel.stages import Split, even_split, megatron_layout

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Dtypes by their names in a config."""

VOCAB_MULTIPLE = 128
"""Megatron pads the vocabulary to a multiple of this times the tensor-parallel size."""


def padded_vocab_size(arch: Architecture, tensor: int) -> int:
    """Returns the rows of the embedding over all tensor-parallel ranks together."""
    multiple = VOCAB_MULTIPLE * tensor
    return -(-arch.vocab_size // multiple) * multiple


def transformer_config(
    arch: Architecture,
    *,
    dtype: Dtype = "bf16",
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int | None = None,
    stages: Sequence[int] | None = None,
    context: int = 1,
    sequence: bool = False,
    recompute: Recompute = "none",
    recompute_modules: Sequence[RecomputeModule] | None = None,
    recompute_layers: int | None = None,
    trainable: bool = True,
    fusions: bool | None = None,
    layers: LayerKind = "local",
) -> TransformerConfig:
    """Returns Megatron's config of `arch` under these parallel sizes.

    Weights are not initialised, since `load_hf_weights` writes every one of them.

    Args:
        arch: the model.
        dtype: of parameters and activations.
        tensor: tensor-parallel size.
        pipeline: pipeline-parallel size.
        virtual_pipeline: chunks of a pipeline rank; None = no interleaving.
        stages: layers of each stage (parallel/stages.py); None = as evenly as possible.
        context: context-parallel size.
        sequence: whether tensor-parallel ranks share the tokens between layers.
        recompute: what backward computes again.
        recompute_modules: what `selective` recomputes; None = norms and MLPs.
        recompute_layers: how many layers of a stage recompute, from its first on; None = all. With
            `selective` Megatron knows no such number: call `layer_specs.keep_whole`.
        trainable: False for a frozen model, which recomputes nothing, as it has no backward.
        fusions: Megatron's jitted elementwise kernels; None = on GPUs.
        layers: what `build_gpt` will be given. Transformer Engine's have a fused RoPE.
    """
    check_tensor_size(arch, tensor)
    if stages is None:
        stages = even_split(arch.num_layers, pipeline * (virtual_pipeline or 1))
    assert sum(stages) == arch.num_layers, (stages, arch.num_layers)
    if fusions is None:
        fusions = torch.cuda.is_available()
    with warnings.catch_warnings():
        # Megatron warns about a default of its own.
        warnings.filterwarnings("ignore", message="full scope is deprecated")
        # And about a core attention that is not ours.
        warnings.filterwarnings("ignore", message="If you are using transformer_engine")
        return TransformerConfig(
            num_layers=arch.num_layers,
            hidden_size=arch.hidden_size,
            ffn_hidden_size=arch.ffn_hidden_size,
            num_attention_heads=arch.num_heads,
            num_query_groups=arch.num_kv_heads,
            kv_channels=arch.head_dim,
            softmax_scale=attention_scale(arch),
            layernorm_epsilon=arch.norm_eps,
            normalization="RMSNorm",
            add_bias_linear=False,
            add_qkv_bias=arch.qkv_bias,
            qk_layernorm=arch.qk_norm,
            gated_linear_unit=True,
            activation_func=F.silu,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            params_dtype=DTYPES[dtype],
            pipeline_dtype=DTYPES[dtype],
            bf16=dtype == "bf16",
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=virtual_pipeline,
            pipeline_model_parallel_layout=megatron_layout(stages),
            context_parallel_size=context,
            sequence_parallel=sequence and tensor > 1,
            # Every microbatch has its own length.
            variable_seq_lengths=pipeline > 1,
            # Megatron checks this against variable lengths even for a model without experts.
            moe_token_dispatcher_type="alltoall",
            # Interleaved stages must be sent overlapped: two ranks are each other's neighbours on
            # both sides, and a batched exchange would hand a stage the other neighbour's tensor.
            overlap_p2p_comm=virtual_pipeline is not None,
            batch_p2p_comm=virtual_pipeline is None,
            calculate_per_token_loss=True,
            # Weights are written where they are made: on the GPU, if there is one.
            use_cpu_initialization=not torch.cuda.is_available(),
            perform_initialization=False,
            bias_activation_fusion=fusions,
            # There is neither bias nor dropout: the sum that is left costs the CPU less uncompiled.
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            apply_rope_fusion=layers == "te",
            gradient_accumulation_fusion=False,
            **_recompute_options(
                recompute if trainable else "none", recompute_modules, recompute_layers
            ),
        )


def build_gpt(
    arch: Architecture,
    config: TransformerConfig,
    *,
    core_attention: Callable[..., torch.nn.Module],
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    layers: LayerKind = "local",
) -> GPTModel:
    """Builds this rank's pipeline chunk, whose parameters are not yet written.

    It needs the process groups that `parallel.groups.initialize` makes. The model has no rotary
    embedding of its own: call `.embedding` and `.decoder` with angles from `rope.rotary_angles`,
    not `.forward`.
    """
    groups = megatron_groups()
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=groups.pp.rank())
    block = TransformerBlockSubmodules(
        layer_specs=[layer_spec(layers, arch, core_attention)] * num_layers,
        layer_norm=norm_class(layers),
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=padded_vocab_size(arch, config.tensor_model_parallel_size),
        max_sequence_length=arch.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        position_embedding_type="none",
        pg_collection=groups,
        vp_stage=vp_stage,
    )
    _mark_sharded_weights(model)
    return model


def _mark_sharded_weights(model: GPTModel) -> None:
    """Marks the weights of which each tensor-parallel rank holds a part.

    Megatron does so where it initialises weights, which we leave out. Without the marks, the
    gradient norm would count the first rank's part alone.
    """
    for module in model.modules():
        if isinstance(module, tensor_parallel.RowParallelLinear):
            partition_dim = 1
        elif isinstance(
            module, tensor_parallel.ColumnParallelLinear | tensor_parallel.VocabParallelEmbedding
        ):
            partition_dim = 0
        else:
            continue
        weight = module.weight
        if weight is not None and not hasattr(weight, "tensor_model_parallel"):
            tensor_parallel.set_tensor_model_parallel_attributes(
                tensor=weight, is_parallel=True, dim=partition_dim, stride=1
            )


def _recompute_options(
    recompute: Recompute, modules: Sequence[RecomputeModule] | None, layers: int | None
) -> dict[str, Any]:
    """Returns the fields of Megatron's config that say what is recomputed.

    The default of `selective` is norms and MLPs, which are cheap to compute twice; the core
    attention of a long row is not. For Megatron `all_but_attention` is `full`: our core attention
    does not run again (`TreeAttention`).
    """
    if recompute == "none":
        return {}
    if recompute in ("all_but_attention", "full"):
        return {
            "recompute_granularity": "full",
            # Of each: one layer at a time, or the first ones of a stage, one at a time.
            "recompute_method": "uniform" if layers is None else "block",
            "recompute_num_layers": 1 if layers is None else layers,
        }
    mend_norm_recompute()
    return {
        "recompute_granularity": "selective",
        "recompute_modules": list(modules or ("layernorm", "mlp")),
    }


def check_tensor_size(arch: Architecture, tensor: int) -> None:
    """Refuses a tensor-parallel size that cannot split this model, naming those that can."""
    fitting = [size for size in range(1, arch.num_heads + 1) if _tensor_fits(arch, size)]
    if tensor not in fitting:
        raise UserError(
            f"parallel.tensor ({tensor}) cannot split {arch.num_heads} heads, "
            f"{arch.num_kv_heads} key/value heads and an MLP of {arch.ffn_hidden_size} evenly; "
            f"use {_listed(fitting)}"
        )


def check_stages(
    arch: Architecture, *, pipeline: int, virtual_pipeline: int | None, layout: str | None
) -> Split:
    """Returns the layers of each stage.

    Raises:
        UserError: for more stages than layers, and for a layout with another number of layers.
    """
    if layout is not None:
        split = parse_layout(layout)
        if sum(split) != arch.num_layers:
            raise UserError(
                f"parallel.pipeline_layout ({layout}): its {sum(split)} layers (t) must be the "
                f"model's {arch.num_layers}. Add or remove some, or leave it out"
            )
        return split
    stages = pipeline * (virtual_pipeline or 1)
    if stages > arch.num_layers:
        name = "parallel.pipeline" + (" x virtual_pipeline" if virtual_pipeline else "")
        raise UserError(
            f"{name} ({stages}) must not exceed the model's {arch.num_layers} layers. Lower it, or "
            "give embedding and loss stages of their own with parallel.pipeline_layout"
        )
    return even_split(arch.num_layers, stages)


def _tensor_fits(arch: Architecture, tensor: int) -> bool:
    kv_heads_fit = arch.num_kv_heads % tensor == 0 or tensor % arch.num_kv_heads == 0
    return arch.num_heads % tensor == 0 and arch.ffn_hidden_size % tensor == 0 and kv_heads_fit


def _listed(sizes: list[int]) -> str:
    """`1`, or `1, 2 or 4`."""
    *others, last = map(str, sizes)
    return f"{', '.join(others)} or {last}" if others else last
