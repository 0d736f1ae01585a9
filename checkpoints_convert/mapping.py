"""Which Hugging Face tensors make up which Megatron tensor, and the way there and back.

One `TensorRule` a Megatron tensor. All four families share the same names; they differ in which
rules apply (q/k/v bias, q/k norm, untied output layer).

Letters: G key/value heads, Q query heads a key/value head, D head size, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_longpo.model.architectures import Architecture

Kind = Literal["plain", "qkv", "gate_up", "vocab"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRule:
    """One tensor of the whole (unsharded) Megatron model.

    `plain` tensors are the same on both sides, `qkv` joins three, `gate_up` two, and `vocab` has
    padding rows after the Hugging Face ones.
    """

    megatron_name: str
    """Parameter name with the layer's number in the whole model."""
    checkpoint_key: str
    """Key in a `torch_dist` checkpoint. A layer's tensor is one row of a stack over layers."""
    layer: int | None
    """The layer's number from 0, None outside the layers."""
    hf_names: tuple[str, ...]
    kind: Kind = "plain"
    split_dim: int | None = None
    """The dimension that tensor parallelism splits, None = every rank holds the whole tensor."""

    @property
    def fused_name(self) -> str:
        """The parameter's name where norms are fused with the linear layers behind them."""
        layers = "decoder.layers."
        if self.layer is None:
            return self.checkpoint_key
        return f"{layers}{self.layer}.{self.checkpoint_key.removeprefix(layers)}"


def tensor_rules(arch: Architecture) -> Iterator[TensorRule]:
    """The rules of the whole model, in the order of Hugging Face files."""
    yield TensorRule(
        megatron_name="embedding.word_embeddings.weight",
        checkpoint_key="embedding.word_embeddings.weight",
        layer=None,
        hf_names=("model.embed_tokens.weight",),
        kind="vocab",
        split_dim=0,
    )
    for layer in range(arch.num_layers):
        yield from _layer_rules(arch, layer)
    yield TensorRule(
        megatron_name="decoder.final_layernorm.weight",
        checkpoint_key="decoder.final_layernorm.weight",
        layer=None,
        hf_names=("model.norm.weight",),
    )
    if not arch.tied_embeddings:
        yield output_rule(arch)


def output_rule(arch: Architecture) -> TensorRule:
    """The output layer. Where it is tied, a last pipeline stage holds a copy of the embedding."""
    name = "model.embed_tokens.weight" if arch.tied_embeddings else "lm_head.weight"
    return TensorRule(
        megatron_name="output_layer.weight",
        checkpoint_key="output_layer.weight",
        layer=None,
        hf_names=(name,),
        kind="vocab",
        split_dim=0,
    )


def hf_shapes(rule: TensorRule, arch: Architecture) -> list[tuple[int, ...]]:
    """The shapes that the rule's Hugging Face tensors must have."""
    return [_hf_shape(name, arch) for name in rule.hf_names]


def to_megatron(rule: TensorRule, arch: Architecture, parts: Sequence[Tensor]) -> Tensor:
    """Hugging Face tensors in the rule's order -> the whole Megatron tensor, without padding."""
    if rule.kind == "qkv":
        return _join_qkv(arch, *parts)
    if rule.kind == "gate_up":
        return torch.cat(list(parts))
    return parts[0]


def to_hf(rule: TensorRule, arch: Architecture, tensor: Tensor) -> list[Tensor]:
    """The inverse of `to_megatron`; padding rows are cut off."""
    if rule.kind == "qkv":
        return _split_qkv(arch, tensor)
    if rule.kind == "gate_up":
        return list(tensor.chunk(2))
    if rule.kind == "vocab":
        return [tensor[: arch.vocab_size]]
    return [tensor]


def local_shard(
    rule: TensorRule, tensor: Tensor, *, rank: int, size: int, padded_vocab_size: int
) -> Tensor:
    """What tensor-parallel rank `rank` of `size` holds of the whole Megatron tensor."""
    if rule.kind == "vocab":
        return _vocab_shard(tensor, rank=rank, size=size, padded_rows=padded_vocab_size)
    if rule.split_dim is None or size == 1:
        return tensor
    if rule.kind == "gate_up":
        # Each rank holds its part of the gate above its part of the up projection.
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(size, dim=rule.split_dim)[rank]


def _layer_rules(arch: Architecture, layer: int) -> Iterator[TensorRule]:
    def rule(
        megatron: str,
        *hf: str,
        key: str | None = None,
        kind: Kind = "plain",
        split_dim: int | None = None,
    ) -> TensorRule:
        return TensorRule(
            megatron_name=f"decoder.layers.{layer}.{megatron}",
            checkpoint_key=f"decoder.layers.{key or megatron}",
            layer=layer,
            hf_names=tuple(f"model.layers.{layer}.{name}" for name in hf),
            kind=kind,
            split_dim=split_dim,
        )

    # Stock checkpoints call a norm by the linear layer that it is fused with elsewhere.
    yield rule(
        "input_layernorm.weight",
        "input_layernorm.weight",
        key="self_attention.linear_qkv.layer_norm_weight",
    )
    for leaf in ("weight", "bias") if arch.qkv_bias else ("weight",):
        yield rule(
            f"self_attention.linear_qkv.{leaf}",
            *(f"self_attn.{which}_proj.{leaf}" for which in "qkv"),
            kind="qkv",
            split_dim=0,
        )
    if arch.qk_norm:
        yield rule("self_attention.q_layernorm.weight", "self_attn.q_norm.weight")
        yield rule("self_attention.k_layernorm.weight", "self_attn.k_norm.weight")
    yield rule("self_attention.linear_proj.weight", "self_attn.o_proj.weight", split_dim=1)
    yield rule(
        "pre_mlp_layernorm.weight",
        "post_attention_layernorm.weight",
        key="mlp.linear_fc1.layer_norm_weight",
    )
    yield rule(
        "mlp.linear_fc1.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        kind="gate_up",
        split_dim=0,
    )
    yield rule("mlp.linear_fc2.weight", "mlp.down_proj.weight", split_dim=1)


def _hf_shape(name: str, arch: Architecture) -> tuple[int, ...]:
    query_size = arch.num_heads * arch.head_dim
    key_size = arch.num_kv_heads * arch.head_dim
    module, leaf = name.split(".")[-2:]
    rows, columns = {
        "embed_tokens": (arch.vocab_size, arch.hidden_size),
        "lm_head": (arch.vocab_size, arch.hidden_size),
        "q_proj": (query_size, arch.hidden_size),
        "k_proj": (key_size, arch.hidden_size),
        "v_proj": (key_size, arch.hidden_size),
        "o_proj": (arch.hidden_size, query_size),
        "gate_proj": (arch.ffn_hidden_size, arch.hidden_size),
        "up_proj": (arch.ffn_hidden_size, arch.hidden_size),
        "down_proj": (arch.hidden_size, arch.ffn_hidden_size),
        "q_norm": (arch.head_dim, None),
        "k_norm": (arch.head_dim, None),
    }.get(module, (arch.hidden_size, None))
    return (rows,) if columns is None or leaf == "bias" else (rows, columns)


def _join_qkv(arch: Architecture, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[G*Q*D, ...], [G*D, ...], [G*D, ...] -> [G*(Q+2)*D, ...].

    Megatron keeps each key/value head's query heads together with it, so that a contiguous split
    over ranks gives each rank whole groups.
    """
    rest = q.shape[1:]
    groups = (arch.num_kv_heads, -1, arch.head_dim, *rest)
    joined = torch.cat((q.reshape(groups), k.reshape(groups), v.reshape(groups)), dim=1)
    return joined.reshape(-1, *rest)


def _split_qkv(arch: Architecture, qkv: Tensor) -> list[Tensor]:
    rest = qkv.shape[1:]
    grouped = qkv.reshape(arch.num_kv_heads, arch.heads_per_group + 2, arch.head_dim, *rest)
    return [part.reshape(-1, *rest) for part in grouped.split([arch.heads_per_group, 1, 1], dim=1)]


def _vocab_shard(tensor: Tensor, *, rank: int, size: int, padded_rows: int) -> Tensor:
    """This rank's rows, padding rows zero: no token has their ids, so they are never trained."""
    rows = padded_rows // size
    shard = tensor.new_zeros(rows, *tensor.shape[1:])
    own = tensor[rank * rows : (rank + 1) * rows]
    shard[: len(own)] = own
    return shard
