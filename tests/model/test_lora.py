"""Adapters on linear layers: how they begin, when they count, and where they do not fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_longpo.config.train import LoraConfig
from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import read_architecture
from megatron_longpo.model.lora import (
    TARGETS,
    Adapter,
    adapters,
    adapters_off,
    attach_adapters,
    initial_a,
)
from megatron_longpo.model.spec import build_gpt, transformer_config
from megatron_longpo.parallel.groups import Groups
from tests.parity.cases import TinyModel
from tests.parity.harness import Shelf

ADAPTERS = LoraConfig(rank=4, alpha=8.0, targets=tuple(TARGETS))


class Identity(nn.Module):
    def __init__(self, **_: Any) -> None:
        super().__init__()


@pytest.fixture
def gpt(shelf: Shelf, single_process: Groups) -> Any:
    arch = read_architecture(shelf.hf_folder(TinyModel()))
    model = build_gpt(arch, transformer_config(arch, dtype="fp32"), core_attention=Identity)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    attach_adapters(model, ADAPTERS, seed=3, tensor_group=single_process.tensor)
    return model


def test_a_begins_as_pefts_and_differs_from_layer_to_layer() -> None:
    shape = (64, 400)
    a = initial_a(shape, seed=1, layer=0, target="linear_qkv")
    peft = torch.empty(shape)
    nn.init.kaiming_uniform_(peft, a=5**0.5)
    assert a.abs().max() <= 1 / 20 and a.abs().max() == pytest.approx(1 / 20, rel=1e-3)
    assert a.std().item() == pytest.approx(peft.std().item(), rel=0.02)
    assert a.mean().abs() < 0.02 / 20
    assert torch.equal(a, initial_a(shape, seed=1, layer=0, target="linear_qkv"))
    for other in (
        initial_a(shape, seed=2, layer=0, target="linear_qkv"),
        initial_a(shape, seed=1, layer=1, target="linear_qkv"),
        initial_a(shape, seed=1, layer=0, target="linear_fc1"),
    ):
        assert not torch.isclose(a, other).any(dim=1).all()


def test_the_random_state_of_the_run_is_left_alone() -> None:
    before = torch.get_rng_state()
    initial_a((2, 3), seed=1, layer=0, target="linear_qkv")
    assert torch.equal(torch.get_rng_state(), before)


def test_an_adapter_adds_its_scaled_product(gpt: Any) -> None:
    linear = gpt.decoder.layers[1].mlp.linear_fc2
    x = torch.randn(5, 1, 48)
    base, bias = linear(x)
    assert bias is None
    assert torch.equal(base, x @ linear.weight.T), "B begins as 0"
    with torch.no_grad():
        linear.adapter.lora_b.normal_()
    update = 2.0 * x @ linear.adapter.lora_a.T @ linear.adapter.lora_b.T
    torch.testing.assert_close(linear(x)[0], base + update)
    with adapters_off(gpt):
        assert torch.equal(linear(x)[0], base)
    torch.testing.assert_close(linear(x)[0], base + update)


@pytest.mark.parametrize("is_training", [True, False])
def test_what_is_switched_off_comes_back(gpt: Any, is_training: bool) -> None:
    gpt.train(is_training)
    with pytest.raises(RuntimeError, match="in between"), adapters_off(gpt):
        assert not any(module.training for module in gpt.modules())
        raise RuntimeError("in between")
    assert all(adapter.is_on for _, adapter in adapters(gpt))
    assert all(module.training is is_training for module in gpt.modules())


def test_the_base_keeps_its_names_and_is_frozen(gpt: Any) -> None:
    names = {name: p.requires_grad for name, p in gpt.named_parameters()}
    assert names["decoder.layers.0.self_attention.linear_qkv.weight"] is False
    assert names["decoder.layers.0.self_attention.linear_qkv.adapter.lora_a"] is True
    assert sum(names.values()) == 2 * 4 * 2 == len([n for n in names if ".adapter." in n])
    embedded = gpt.embedding(input_ids=torch.tensor([[1, 2]]), position_ids=torch.tensor([[0, 1]]))
    assert embedded.requires_grad, "recomputed layers would lead no gradient on"


def linear_like(**attributes: Any) -> Any:
    linear: Any = nn.Module()
    linear.weight = nn.Parameter(torch.zeros(6, 4))
    for name, value in attributes.items():
        setattr(linear, name, value)
    return linear


def adapter_of(linear: Any) -> Adapter:
    group: Any = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    return Adapter(
        linear,
        ADAPTERS,
        target="linear_qkv",
        layer=0,
        seed=1,
        is_sequence_parallel=True,
        tensor_group=group,
    )


def test_layers_of_transformer_engine_say_how_they_are_split() -> None:
    column = adapter_of(linear_like(parallel_mode="column"))
    assert column.lora_a.shape == (4, 4) and column.lora_b.shape == (6, 4)
    assert column.lora_a.sequence_parallel and column.lora_b.partition_dim == 0
    row = adapter_of(linear_like(parallel_mode="row"))
    whole = initial_a((4, 8), seed=1, layer=0, target="linear_qkv")
    assert torch.equal(row.lora_a, whole[:, 4:]) and row.lora_a.partition_dim == 1
    assert row.lora_b.sequence_parallel and not hasattr(row.lora_b, "partition_dim")


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, r"lora\.targets \(linear_qkv\): this model's linear_qkv is a Module, which is split"),
        (
            {"parallel_mode": "column", "layer_norm_weight": torch.ones(4)},
            r"lora\.targets \(linear_qkv\): .* normalises its own input",
        ),
    ],
)
def test_layers_that_adapters_do_not_fit_are_refused(
    attributes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        adapter_of(linear_like(**attributes))
    assert "\n" not in str(caught.value)
