"""Writes weights into this rank's part of a GPTModel, one whole tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from checkpoints_convert.hf_weights import HfWeights
from checkpoints_convert.mapping import TensorRule, local_shard, output_rule, tensor_rules
from megatron_longpo.model.architectures import Architecture
from megatron_longpo.model.lora import is_adapter_parameter
from megatron_longpo.model.spec import padded_vocab_size


def load_hf_weights(gpt_model: GPTModel, arch: Architecture, hf_folder: str) -> None:
    """Writes every parameter of this rank's `gpt_model` from the folder's safetensors.

    The model may be one pipeline chunk, split over tensor-parallel ranks and padded. Each rank
    reads only what it needs, one Hugging Face tensor at a time. Call it before the model is
    wrapped.
    """
    weights = HfWeights(hf_folder)
    weights.check(arch)
    write_parameters(gpt_model, arch, lambda rule: weights.read_rule(rule, arch))


def write_parameters(
    gpt_model: GPTModel, arch: Architecture, whole: Callable[[TensorRule], Tensor]
) -> None:
    """Writes this rank's part of every parameter; `whole` returns the whole tensor of a rule."""
    size = gpt_model.config.tensor_model_parallel_size
    rank = gpt_model.tp_group.rank()
    with torch.no_grad():
        for parameter, rule in local_rules(gpt_model, arch):
            shard = local_shard(
                rule,
                whole(rule),
                rank=rank,
                size=size,
                padded_vocab_size=padded_vocab_size(arch, size),
            )
            assert shard.shape == parameter.shape, (rule, shard.shape, parameter.shape)
            parameter.copy_(shard)


def local_rules(
    gpt_model: GPTModel, arch: Architecture
) -> Iterator[tuple[torch.nn.Parameter, TensorRule]]:
    """Yields the parameters of this rank's model, without adapters, and their rules, in order."""
    rules = {
        name: rule
        for rule in (*tensor_rules(arch), output_rule(arch))
        for name in (rule.megatron_name, rule.fused_name)
    }
    prefix = "decoder.layers."
    for name, parameter in gpt_model.named_parameters():
        if is_adapter_parameter(name):
            continue
        if name.startswith(prefix):
            local, rest = name.removeprefix(prefix).split(".", 1)
            layer = gpt_model.decoder.layers[int(local)].layer_number - 1
            name = f"{prefix}{layer}.{rest}"
        assert name in rules, f"no rule for parameter {name}"
        yield parameter, rules[name]
