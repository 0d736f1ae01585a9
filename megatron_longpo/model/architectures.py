"""What a Hugging Face config.json says about a model, checked against what we can build.

It needs no torch, so that a wrong folder or setting is refused before anything heavy is imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longpo.errors import UserError
from megatron_longpo.model.rope_config import RopeConfig, read_rope_config


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What the class name in `architectures` says beyond the numbers of config.json."""

    name: str
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    """Default where config.json has none; None = hidden size / heads."""
    kv_heads: int | None = None
    """Default where config.json has none; None = as many as query heads."""
    sliding_window: int | None = None
    """Default where config.json has no such key and the family needs no switch for it."""
    sliding_window_switch: str | None = None
    """The key that turns the window on; None = the window is on wherever it is set."""


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(name="llama", sliding_window_switch="never"),
    "MistralForCausalLM": Family(name="mistral", kv_heads=8, sliding_window=4096),
    "Qwen2ForCausalLM": Family(
        name="qwen2", qkv_bias=True, kv_heads=32, sliding_window_switch="use_sliding_window"
    ),
    "Qwen3ForCausalLM": Family(
        name="qwen3",
        qk_norm=True,
        head_dim=128,
        kv_heads=32,
        sliding_window_switch="use_sliding_window",
    ),
}
"""Supported architectures with the defaults that transformers' config classes give."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What is needed to build a model, to convert its weights and to write its config."""

    family: str
    """llama, mistral, qwen2 or qwen3."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """Rows of the Hugging Face embedding, without Megatron's padding."""
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    rope: RopeConfig

    @property
    def max_position_embeddings(self) -> int:
        return self.rope.max_position_embeddings

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


def read_architecture(
    hf_folder: str,
    *,
    rope_theta: float | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    max_position_embeddings: int | None = None,
) -> Architecture:
    """Reads `hf_folder`/config.json; the keyword arguments replace what it says (None = keep)."""
    path, config = read_hf_config(hf_folder)
    family = _family(path, config)
    _refuse_unmodelled(path, config, family)
    num_heads = _integer(path, config, "num_attention_heads")
    hidden_size = _integer(path, config, "hidden_size")
    num_kv_heads = _integer(path, config, "num_key_value_heads", family.kv_heads or num_heads)
    head_dim = _integer(path, config, "head_dim", family.head_dim or hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise UserError(
            f"{path}: num_attention_heads ({num_heads}) must be divisible by "
            f"num_key_value_heads ({num_kv_heads}); the file is damaged"
        )
    if head_dim % 2:
        raise UserError(f"{path}: head_dim ({head_dim}) must be even for rotary embeddings")
    return Architecture(
        family=family.name,
        num_layers=_integer(path, config, "num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=_integer(path, config, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=_integer(path, config, "vocab_size"),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope=read_rope_config(
            path,
            config,
            own_positions=_integer(path, config, "max_position_embeddings"),
            theta=rope_theta,
            scaling=rope_scaling,
            max_position_embeddings=max_position_embeddings,
        ),
    )


def read_hf_config(hf_folder: str) -> tuple[Path, dict[str, Any]]:
    """Returns the path and the content of `hf_folder`/config.json."""
    path = Path(hf_folder) / "config.json"
    if not path.is_file():
        raise UserError(
            f"{hf_folder}: no config.json here; give a Hugging Face model folder "
            "(config.json, *.safetensors, tokenizer files)"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore the file") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return path, config


def effective_hf_config(config: Mapping[str, Any], arch: Architecture) -> dict[str, Any]:
    """Returns a copy of `config` with the positions and RoPE of `arch`, for every reader.

    transformers 4 reads the top-level `rope_theta` and `rope_scaling`, transformers 5 reads
    `rope_parameters`. Both spellings are written, and they agree.
    """
    scaling = None if arch.rope.scaling is None else dict(arch.rope.scaling)
    effective = dict(config)
    effective["rope_theta"] = arch.rope.theta
    effective["rope_scaling"] = scaling
    effective["rope_parameters"] = {
        "rope_type": "default",
        **(scaling or {}),
        "rope_theta": arch.rope.theta,
    }
    effective["max_position_embeddings"] = arch.max_position_embeddings
    return effective


def _family(path: Path, config: Mapping[str, Any]) -> Family:
    """Returns the family that `architectures` names, or where it is empty `model_type`."""
    supported = ", ".join(FAMILIES)
    named = config.get("architectures") or []
    if not named:
        by_type = {family.name: family for family in FAMILIES.values()}
        if config.get("model_type") in by_type:
            return by_type[config["model_type"]]
        raise UserError(
            f"{path}: neither architectures nor model_type ({config.get('model_type')!r}) names a "
            f"supported model; supported: {supported}"
        )
    if named[0] not in FAMILIES:
        raise UserError(f"{path}: architectures {named} is not supported; supported: {supported}")
    return FAMILIES[named[0]]


def _refuse_unmodelled(path: Path, config: Mapping[str, Any], family: Family) -> None:
    """Refuses what would load and then compute something else than transformers does."""
    if config.get("quantization_config"):
        raise UserError(
            f"{path}: quantization_config is set; training needs unquantised weights (bf16, fp32)"
        )
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise UserError(f"{path}: hidden_act ({activation}) is not supported; supported: silu")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise UserError(f"{path}: {key} (true) is not supported; only Qwen2's q/k/v bias is")
    window = _sliding_window(config, family)
    if window is not None:
        raise UserError(
            f"{path}: sliding_window ({window}) is on and not supported; use a model without it, "
            "or set sliding_window to null if the model was trained for full attention"
        )


def _sliding_window(config: Mapping[str, Any], family: Family) -> int | str | None:
    """Returns the window that transformers would apply, None for full attention."""
    if "sliding_attention" in (config.get("layer_types") or []):
        return config.get("sliding_window") or "layer_types"
    if family.sliding_window_switch is None:
        return config.get("sliding_window", family.sliding_window)
    return config.get("sliding_window") if config.get(family.sliding_window_switch) else None


def _integer(path: Path, config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{path}: {key} ({value!r}) must be a positive whole number")
    return value
