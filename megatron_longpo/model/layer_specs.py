"""What a transformer layer is made of: Megatron's own modules, or Transformer Engine's on GPUs.

Both have our core attention, and the same checkpoint keys: those of a stock GPTModel. Transformer
Engine fuses a norm with the linear layer behind it: the norm's parameter is the linear layer's
`layer_norm_weight`, the name that stock checkpoints use too.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_longpo.config.names import LayerKind, Layers
from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import Architecture
from megatron_longpo.model.norm import RMSNorm


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerChoice:
    """The layers that a model is built of."""

    kind: LayerKind
    line: str
    """What the start of a run prints about them."""


def choose_layers(
    setting: Layers, *, device: torch.device, dtype: torch.dtype, has_lora: bool
) -> LayerChoice:
    """Returns the layers that `model.layers` names; of `auto` Transformer Engine's where they run.

    Raises:
        UserError: if Transformer Engine is named and not available; the message says why.
    """
    if setting == "local":
        return LayerChoice(kind="local", line="layers: local (Megatron's own modules)")
    obstacle = _te_obstacle(device=device, dtype=dtype, has_lora=has_lora)
    if obstacle is None:
        return LayerChoice(kind="te", line="layers: te (Transformer Engine)")
    if setting == "te":
        raise UserError(f"model.layers (te): {obstacle}; use auto or local")
    return LayerChoice(
        kind="local", line=f"layers: local (Megatron's own modules); not te: {obstacle}"
    )


def _te_obstacle(*, device: torch.device, dtype: torch.dtype, has_lora: bool) -> str | None:
    if device.type == "cpu":
        return "it needs a GPU"
    if dtype != torch.bfloat16:
        return "its matrix products are for bf16, and model.dtype is fp32"
    if has_lora:
        return "adapters are put on Megatron's own linear layers"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ModuleNotFoundError:
        return "the package transformer_engine is not installed (the gpu extra has it)"
    except Exception as failure:  # whatever a library throws that does not fit the machine
        return f"it cannot be imported ({' '.join(str(failure).split())})"
    return None


def layer_spec(
    kind: LayerKind, arch: Architecture, core_attention: Callable[..., torch.nn.Module]
) -> ModuleSpec:
    """Returns a stock layer of this kind, with stock checkpoint keys, but our core attention."""
    if kind == "te":
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=arch.qk_norm)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=arch.qk_norm, normalization="RMSNorm")
        spec.submodules.input_layernorm = RMSNorm
        spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = core_attention
    if arch.qk_norm:
        attention.q_layernorm = norm_class(kind)
        attention.k_layernorm = norm_class(kind)
    return spec


def norm_class(kind: LayerKind) -> type[torch.nn.Module]:
    """Returns the class of norms that are not fused: the final one, those of queries and keys."""
    return _te_norm_class() if kind == "te" else RMSNorm


@functools.cache
def _te_norm_class() -> type[torch.nn.Module]:
    te: Any = importlib.import_module("transformer_engine.pytorch")

    class FusedRMSNorm(te.RMSNorm):  # type: ignore[misc]
        """Transformer Engine's RMSNorm, built as Megatron builds norms.

        Checkpoints leave out its extra state, which is for fp8: local norms have none.
        """

        get_extra_state = torch.nn.Module.get_extra_state
        set_extra_state = torch.nn.Module.set_extra_state

        def __init__(
            self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
        ) -> None:
            super().__init__(
                hidden_size,
                eps=eps,
                sequence_parallel=config.sequence_parallel,
                dtype=config.params_dtype,
                device="cpu" if config.use_cpu_initialization else "cuda",
            )

    return FusedRMSNorm


def keep_whole(layers: Iterable[torch.nn.Module]) -> None:
    """Makes layers keep all of their activations though other layers recompute modules.

    Megatron's config has one list of modules for all layers. Each layer reads it when it is built.
    """
    layer: Any
    for layer in layers:
        layer.recompute_input_layernorm = False
        layer.recompute_pre_mlp_layernorm = False
        layer.recompute_mlp = False
        layer.self_attention.checkpoint_core_attention = False


def accumulate_in_main_grad(model: torch.nn.Module) -> None:
    """Makes Transformer Engine's linear layers add weight gradients to DDP's buffer themselves.

    This saves writing and adding a copy of every gradient. Megatron's config has the same switch,
    but refuses it without apex because of the output layer, whose own forward never runs here.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
