"""Operations of a step, worked out by hand on numbers small enough to check."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_longpo.config.train import LoraConfig
from megatron_longpo.data.trees.packing import PairSize
from megatron_longpo.engine.flops import adapter_parameters, layer_parameters, step_flops
from megatron_longpo.model.architectures import Architecture
from megatron_longpo.model.rope_config import RopeConfig

ARCH = Architecture(
    family="llama",
    num_layers=2,
    hidden_size=3,
    ffn_hidden_size=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    vocab_size=7,
    norm_eps=1e-6,
    tied_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
    rope=RopeConfig(theta=1e4, scaling=None, max_position_embeddings=64),
)

SIZE = PairSize(
    policy_tokens=10,
    unshared_tokens=99,
    reference_tokens=6,
    policy_attended=40,
    reference_attended=15,
    policy_edges=9,
    reference_edges=4,
)


def test_matrices_of_a_layer() -> None:
    # q and output 3 x 8 each, k and v 3 x 4 each, three of the MLP 3 x 5.
    assert layer_parameters(ARCH) == 2 * 24 + 2 * 12 + 3 * 15


def test_a_step_by_hand() -> None:
    parameters = 2 * (48 + 24 + 45)
    policy = 6 * parameters * 10 + 12 * 2 * 8 * 40 + 6 * 3 * 7 * 9
    reference = (6 * parameters * 6 + 12 * 2 * 8 * 15 + 6 * 3 * 7 * 4) / 3
    assert step_flops([SIZE], ARCH, None) == policy
    assert step_flops([SIZE], ARCH, ARCH) == pytest.approx(policy + reference)
    assert step_flops([SIZE, SIZE], ARCH, ARCH) == pytest.approx(2 * (policy + reference))


def test_frozen_matrices_cost_a_third_less_and_adapters_come_on_top() -> None:
    lora = LoraConfig(rank=2, alpha=1.0, targets=("linear_qkv", "linear_fc2"))
    # 3 in and 16 out for queries, keys and values; 5 in and 3 out for the down projection.
    assert adapter_parameters(ARCH, lora) == 2 * (19 + 8)
    frozen = 4 * 234 * 10 + 12 * 2 * 8 * 40 + 4 * 3 * 7 * 9
    assert step_flops([SIZE], ARCH, None, lora=lora) == frozen + 6 * 2 * 54 * 10
    extra = step_flops([SIZE], ARCH, ARCH, lora=lora) - step_flops([SIZE], ARCH, None, lora=lora)
    assert extra == pytest.approx(step_flops([SIZE], ARCH, ARCH) - step_flops([SIZE], ARCH, None))


def test_the_reference_counts_by_its_own_shape() -> None:
    larger = replace(ARCH, num_layers=4)
    extra = step_flops([SIZE], ARCH, larger) - step_flops([SIZE], ARCH, ARCH)
    assert extra == pytest.approx((6 * 2 * 117 * 6 + 12 * 2 * 8 * 15) / 3)
