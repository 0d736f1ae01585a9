"""Maps Hugging Face tensors to Megatron tensors and back.

`LAYER_TABLE` and the three templates before it list every tensor once; a `TensorRule` is a template
filled in for one model and layer. All families use these names; they differ in which templates
apply.
docs/architectures.md says how to add one.

Letters: G key/value heads, Q query heads a key/value head, D head size, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_longpo.model.architectures import Architecture

Kind = Literal["plain", "qkv", "gate_up", "vocab"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRule:
    """One tensor of the whole (unsharded) Megatron model, and its Hugging Face tensors.

    A `plain` tensor is equal on both sides, `qkv` joins three Hugging Face tensors, `gate_up` joins
    two, and `vocab` has padding rows after the Hugging Face rows.
    """

    megatron_name: str
    """Parameter name, with the layer's number in the whole model."""
    checkpoint_key: str
    """Key in a `torch_dist` checkpoint. A layer's tensor is one row of a stack over layers."""
    layer: int | None
    """The layer's number from 0, None outside the layers."""
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    """The shapes that the Hugging Face tensors must have."""
    kind: Kind = "plain"
    split_dim: int | None = None
    """The dimension that tensor parallelism splits; None = every rank has the whole tensor."""

    @property
    def fused_name(self) -> str:
        """The parameter's name in models that fuse norms with the linear layers after them."""
        layers = "decoder.layers."
        if self.layer is None:
            return self.checkpoint_key
        return f"{layers}{self.layer}.{self.checkpoint_key.removeprefix(layers)}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the Megatron tensor, without padding."""
        return (sum(shape[0] for shape in self.hf_shapes), *self.hf_shapes[0][1:])


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleTemplate:
    """A `TensorRule` for any model, and for every layer if it is in `LAYER_TABLE`."""

    megatron: str
    """Parameter name; in a layer, without `decoder.layers.N.`."""
    hf: Mapping[str, str]
    """Hugging Face names (in a layer, without `model.layers.N.`) and dimensions, one letter of
    `dimensions` each."""
    key: str | None = None
    """Name in a checkpoint; None = `megatron`."""
    kind: Kind = "plain"
    split_dim: int | None = None
    only_if: str | None = None
    """The field of `Architecture` that must be true for the template to apply; None = always."""


EMBEDDING = RuleTemplate(
    megatron="embedding.word_embeddings.weight",
    hf={"model.embed_tokens.weight": "vh"},
    kind="vocab",
    split_dim=0,
)
FINAL_NORM = RuleTemplate(megatron="decoder.final_layernorm.weight", hf={"model.norm.weight": "h"})
OUTPUT = RuleTemplate(
    megatron="output_layer.weight",
    hf={"lm_head.weight": "vh"},
    kind="vocab",
    split_dim=0,
)

LAYER_TABLE = (
    # Stock checkpoints name a norm after the linear layer that it is fused with elsewhere.
    RuleTemplate(
        megatron="input_layernorm.weight",
        hf={"input_layernorm.weight": "h"},
        key="self_attention.linear_qkv.layer_norm_weight",
    ),
    RuleTemplate(
        megatron="self_attention.linear_qkv.weight",
        hf={
            "self_attn.q_proj.weight": "qh",
            "self_attn.k_proj.weight": "kh",
            "self_attn.v_proj.weight": "kh",
        },
        kind="qkv",
        split_dim=0,
    ),
    RuleTemplate(
        megatron="self_attention.linear_qkv.bias",
        hf={
            "self_attn.q_proj.bias": "q",
            "self_attn.k_proj.bias": "k",
            "self_attn.v_proj.bias": "k",
        },
        kind="qkv",
        split_dim=0,
        only_if="qkv_bias",
    ),
    RuleTemplate(
        megatron="self_attention.q_layernorm.weight",
        hf={"self_attn.q_norm.weight": "d"},
        only_if="qk_norm",
    ),
    RuleTemplate(
        megatron="self_attention.k_layernorm.weight",
        hf={"self_attn.k_norm.weight": "d"},
        only_if="qk_norm",
    ),
    RuleTemplate(
        megatron="self_attention.linear_proj.weight",
        hf={"self_attn.o_proj.weight": "hq"},
        split_dim=1,
    ),
    RuleTemplate(
        megatron="pre_mlp_layernorm.weight",
        hf={"post_attention_layernorm.weight": "h"},
        key="mlp.linear_fc1.layer_norm_weight",
    ),
    RuleTemplate(
        megatron="mlp.linear_fc1.weight",
        hf={"mlp.gate_proj.weight": "fh", "mlp.up_proj.weight": "fh"},
        kind="gate_up",
        split_dim=0,
    ),
    RuleTemplate(megatron="mlp.linear_fc2.weight", hf={"mlp.down_proj.weight": "hf"}, split_dim=1),
)
"""The tensors of a layer, in the order of Hugging Face files."""


def dimensions(arch: Architecture) -> dict[str, int]:
    """Returns the sizes that the letters of the templates stand for."""
    return {
        "v": arch.vocab_size,
        "h": arch.hidden_size,
        "q": arch.num_heads * arch.head_dim,
        "k": arch.num_kv_heads * arch.head_dim,
        "d": arch.head_dim,
        "f": arch.ffn_hidden_size,
    }


def tensor_rules(arch: Architecture) -> Iterator[TensorRule]:
    """Yields the rules of the whole model, in the order of Hugging Face files."""
    yield _rule(EMBEDDING, arch)
    for layer in range(arch.num_layers):
        for template in LAYER_TABLE:
            if template.only_if is None or getattr(arch, template.only_if):
                yield _rule(template, arch, layer=layer)
    yield _rule(FINAL_NORM, arch)
    if not arch.tied_embeddings:
        yield _rule(OUTPUT, arch)


def output_rule(arch: Architecture) -> TensorRule:
    """Returns the rule of the output layer; if it is tied, the last stage copies the embedding."""
    template = OUTPUT if not arch.tied_embeddings else replace(OUTPUT, hf=EMBEDDING.hf)
    return _rule(template, arch)


def _rule(template: RuleTemplate, arch: Architecture, *, layer: int | None = None) -> TensorRule:
    sizes = dimensions(arch)
    ours, theirs, key = "", "", template.key or template.megatron
    if layer is not None:
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        key = f"decoder.layers.{key}"
    return TensorRule(
        megatron_name=ours + template.megatron,
        checkpoint_key=key,
        layer=layer,
        hf_names=tuple(theirs + name for name in template.hf),
        hf_shapes=tuple(tuple(sizes[letter] for letter in dims) for dims in template.hf.values()),
        kind=template.kind,
        split_dim=template.split_dim,
    )


def to_megatron(rule: TensorRule, arch: Architecture, parts: Sequence[Tensor]) -> Tensor:
    """Joins Hugging Face tensors in the rule's order to the whole Megatron tensor, unpadded."""
    if rule.kind == "qkv":
        return _join_qkv(arch, *parts)
    if rule.kind == "gate_up":
        return torch.cat(list(parts))
    return parts[0]


def to_hf(rule: TensorRule, arch: Architecture, tensor: Tensor) -> list[Tensor]:
    """Splits a whole Megatron tensor into Hugging Face tensors, and removes padding rows."""
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
    """Returns the part of a whole Megatron tensor on tensor-parallel rank `rank` of `size`."""
    if rule.kind == "vocab":
        return _vocab_shard(tensor, rank=rank, size=size, padded_rows=padded_vocab_size)
    if rule.split_dim is None or size == 1:
        return tensor
    if rule.kind == "gate_up":
        # Each rank has its part of the gate, then its part of the up projection.
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(size, dim=rule.split_dim)[rank]


def _join_qkv(arch: Architecture, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Joins [G*Q*D, ...], [G*D, ...], [G*D, ...] to [G*(Q+2)*D, ...].

    Megatron keeps the query heads of a key/value head beside it, so that a contiguous split over
    ranks gives every rank whole groups.
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
    """Returns this rank's rows. Padding rows are zero: no token has their ids."""
    rows = padded_rows // size
    if size == 1 and len(tensor) == rows:
        return tensor  # the largest tensor: no second copy in memory
    shard = tensor.new_zeros(rows, *tensor.shape[1:])
    own = tensor[rank * rows : (rank + 1) * rows]
    shard[: len(own)] = own
    return shard
