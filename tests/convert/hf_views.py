"""The weights and gradients of a model in memory under their Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from checkpoints_convert.gpt_weights import local_rules
from checkpoints_convert.mapping import to_hf
from megatron_longpo.model.architectures import Architecture


def hf_named_tensors(gpt_model: GPTModel, arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and (views of) weights of a model that no rank shares."""
    for parameter, rule in local_rules(gpt_model, arch):
        yield from zip(rule.hf_names, to_hf(rule, arch, parameter.detach()), strict=True)


def hf_named_gradients(gpt_model: GPTModel, arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    """As `hf_named_tensors`, of the gradients: `main_grad` where Megatron's DDP made one."""
    for parameter, rule in local_rules(gpt_model, arch):
        gradient = getattr(parameter, "main_grad", None)
        gradient = parameter.grad if gradient is None else gradient
        if gradient is None:
            raise ValueError(f"{rule.megatron_name} has no gradient")
        yield from zip(rule.hf_names, to_hf(rule, arch, gradient), strict=True)
