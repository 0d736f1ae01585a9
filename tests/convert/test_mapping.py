from __future__ import annotations

import dataclasses

import pytest
import torch

from checkpoints_convert.mapping import (
    TensorRule,
    local_shard,
    tensor_rules,
    to_hf,
    to_megatron,
)
from megatron_longpo.model.spec import padded_vocab_size
from tests.model.test_norm import TINY

ARCH = dataclasses.replace(TINY, num_layers=2, qkv_bias=True, qk_norm=True)


def rule_of(name: str) -> TensorRule:
    return next(rule for rule in tensor_rules(ARCH) if rule.megatron_name == name)


def parts_of(rule: TensorRule) -> list[torch.Tensor]:
    """Every element differs, so that no exchange of rows goes unseen."""
    start, parts = 0, []
    for shape in rule.hf_shapes:
        count = int(torch.Size(shape).numel())
        parts.append(torch.arange(start, start + count, dtype=torch.float32).reshape(shape))
        start += count
    return parts


@pytest.mark.parametrize("rule", tensor_rules(ARCH), ids=lambda rule: rule.megatron_name)
def test_to_hf_undoes_to_megatron(rule: TensorRule) -> None:
    parts = parts_of(rule)
    back = to_hf(rule, ARCH, to_megatron(rule, ARCH, parts))
    assert len(back) == len(parts)
    for expected, actual in zip(parts, back, strict=True):
        assert torch.equal(actual, expected)


def test_qkv_keeps_each_group_of_heads_together() -> None:
    # 4 query heads, 2 key/value heads, head_dim 8; every row says whose it is.
    rule = rule_of("decoder.layers.0.self_attention.linear_qkv.bias")
    q = torch.tensor([0.0, 1.0, 2.0, 3.0]).repeat_interleave(8)
    k = torch.tensor([10.0, 11.0]).repeat_interleave(8)
    v = torch.tensor([20.0, 21.0]).repeat_interleave(8)
    joined = to_megatron(rule, ARCH, [q, k, v])
    assert joined[::8].tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_gate_stands_above_up_on_every_rank() -> None:
    rule = rule_of("decoder.layers.1.mlp.linear_fc1.weight")
    gate, up = torch.zeros(48, 32), torch.ones(48, 32)
    gate[24:], up[24:] = 2.0, 3.0
    whole = to_megatron(rule, ARCH, [gate, up])
    for rank, (first, second) in enumerate(((0.0, 1.0), (2.0, 3.0))):
        shard = local_shard(rule, whole, rank=rank, size=2, padded_vocab_size=512)
        assert shard.shape == (48, 32)
        assert (shard[:24] == first).all() and (shard[24:] == second).all()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_embedding_shards_join_to_the_rows_and_zero_padding(size: int) -> None:
    rule = rule_of("embedding.word_embeddings.weight")
    whole = 1 + parts_of(rule)[0]
    padded = padded_vocab_size(ARCH, size)
    shards = [
        local_shard(rule, whole, rank=rank, size=size, padded_vocab_size=padded)
        for rank in range(size)
    ]
    assert {shard.shape for shard in shards} == {(padded // size, 32)}
    joined = torch.cat(shards)
    assert torch.equal(joined[:300], whole)
    assert (joined[300:] == 0).all() and len(joined) > 300
    assert torch.equal(to_hf(rule, ARCH, joined)[0], whole)


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("self_attention.linear_qkv.weight", 0),
        ("self_attention.linear_proj.weight", 1),
        ("mlp.linear_fc2.weight", 1),
        ("input_layernorm.weight", None),
        ("self_attention.q_layernorm.weight", None),
    ],
)
def test_shards_join_along_the_split_dimension(name: str, dim: int | None) -> None:
    rule = rule_of(f"decoder.layers.1.{name}")
    whole = to_megatron(rule, ARCH, parts_of(rule))
    shards = [
        local_shard(rule, whole, rank=rank, size=2, padded_vocab_size=512) for rank in range(2)
    ]
    if dim is None:
        assert all(torch.equal(shard, whole) for shard in shards)
    else:
        assert torch.equal(torch.cat(shards, dim=dim), whole)


def test_rules_name_every_tensor_once() -> None:
    for tied in (False, True):
        rules = list(tensor_rules(dataclasses.replace(ARCH, tied_embeddings=tied)))
        hf_names = [name for rule in rules for name in rule.hf_names]
        assert len(hf_names) == len(set(hf_names)) == 3 - tied + 2 * 14
        assert ("lm_head.weight" in hf_names) is not tied
