"""The same adapters in PEFT and in a run of ours: names, values and gradients.

What Megatron fuses shares one A. Here q, k and v (and gate and up) share one too, as one parameter
of several PEFT layers, so that its gradient is the sum over them and its norm counts once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.utils import unwrap_model
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor

from checkpoints_convert.mapping import TensorRule, tensor_rules, to_hf, to_megatron
from megatron_longpo.config.train import LoraConfig
from megatron_longpo.model.lora import adapters, initial_a
from megatron_longpo.training.loop import Run
from tests.parity.gather import joined

PEFT_NAMES = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}


def with_adapters(model: Any, lora: LoraConfig, *, seed: int) -> Any:
    """`model` in PEFT: A as a run of ours with this seed begins, B as `write_b` makes it."""
    names = [name for target in lora.targets for name in PEFT_NAMES[target]]
    settings = PeftLoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=names, lora_dropout=0.0
    )
    peft: Any = get_peft_model(model, settings)
    for index, layer in enumerate(peft.base_model.model.model.layers):
        for target in lora.targets:
            part = layer.self_attn if hasattr(layer.self_attn, PEFT_NAMES[target][0]) else layer.mlp
            linears = [getattr(part, name) for name in PEFT_NAMES[target]]
            first = linears[0].lora_A["default"]
            values = initial_a(tuple(first.weight.shape), seed=seed, layer=index, target=target)
            with torch.no_grad():
                first.weight.copy_(values)
                for name, linear in zip(PEFT_NAMES[target], linears, strict=True):
                    linear.lora_A["default"].weight = first.weight
                    weight = linear.lora_B["default"].weight
                    weight.copy_(some_b(index, name, tuple(weight.shape)))
    return peft.eval()


def some_b(layer: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Values for B of one PEFT layer, which begins as 0 in training."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{layer}.{name}".encode()))
    return 0.1 * torch.randn(shape, generator=generator)


def write_b(run: Run) -> None:
    """Writes `some_b` into this rank's adapters, and into the optimizer's copy of them."""
    arch, tensor = run.sources.policy, run.groups.tensor
    for chunk in unwrap_model(run.model):
        for _, adapter in adapters(chunk.policy):
            rule = rule_of(run, adapter.target, adapter.layer)
            rank = adapter.lora_b.shape[1]
            parts = []
            for name, rows in zip(PEFT_NAMES[adapter.target], rows_of(rule, run), strict=True):
                parts.append(some_b(adapter.layer, name, (rows, rank)))
            whole = to_megatron(rule, arch, parts)
            own = whole
            if adapter.target == "linear_fc1":
                own = torch.cat([half.chunk(tensor.size())[tensor.rank()] for half in parts])
            elif adapter.target == "linear_qkv":
                own = whole.chunk(tensor.size())[tensor.rank()]
            with torch.no_grad():
                adapter.lora_b.copy_(own)
    run.optimizer.reload_model_params()


def gathered_adapters(run: Run, of: Callable[[torch.nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """`of(parameter)` of every adapter, whole, on every rank, by PEFT's names."""
    parameters = {
        f"{adapter.layer}.{adapter.target}.{leaf}": parameter
        for chunk in unwrap_model(run.model)
        for _, adapter in adapters(chunk.policy)
        for leaf, parameter in adapter.named_parameters()
    }
    whole: dict[str, Tensor] = {}
    for key, tensor in joined(run, parameters, of).items():
        layer, target, leaf = key.split(".")
        names = PEFT_NAMES[target]
        rule = rule_of(run, target, int(layer))
        if leaf == "lora_a":
            whole[peft_key(rule, names[0], "lora_A")] = tensor
            continue
        for name, part in zip(names, to_hf(rule, run.sources.policy, tensor), strict=True):
            whole[peft_key(rule, name, "lora_B")] = part
    return whole


def rule_of(run: Run, target: str, layer: int) -> TensorRule:
    (rule,) = (
        rule
        for rule in tensor_rules(run.sources.policy)
        if rule.layer == layer and rule.megatron_name.endswith(f".{target}.weight")
    )
    return rule


def rows_of(rule: TensorRule, run: Run) -> list[int]:
    arch = run.sources.policy
    sizes = {
        "q_proj": arch.num_heads * arch.head_dim,
        "k_proj": arch.num_kv_heads * arch.head_dim,
        "v_proj": arch.num_kv_heads * arch.head_dim,
        "gate_proj": arch.ffn_hidden_size,
        "up_proj": arch.ffn_hidden_size,
    }
    return [sizes.get(name.split(".")[-2], arch.hidden_size) for name in rule.hf_names]


def peft_key(rule: TensorRule, name: str, leaf: str) -> str:
    parent = rule.hf_names[0].rsplit(".", 2)[0]
    return f"base_model.model.{parent}.{name}.{leaf}.default.weight"
