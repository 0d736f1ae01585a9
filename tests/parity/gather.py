"""Puts tensors of a policy that ranks share together again, under Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor

from checkpoints_convert.gpt_weights import local_rules
from checkpoints_convert.mapping import output_rule, tensor_rules, to_hf
from megatron_longpo.training.loop import Run


def gathered(run: Run, of: Callable[[torch.nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """`of(parameter)` of every parameter, whole, on every rank.

    Written from Megatron's layout, without the converters' own sharding code: matrices are cut
    along `partition_dim`, a gated MLP's first matrix as gate and up side by side on each rank.
    """
    arch = run.sources.policy
    parameters = {
        rule.megatron_name: parameter
        for chunk in unwrap_model(run.model)
        for parameter, rule in local_rules(chunk.policy, arch)
    }
    rules = {rule.megatron_name: rule for rule in (*tensor_rules(arch), output_rule(arch))}
    whole: dict[str, Tensor] = {}
    for name, tensor in joined(run, parameters, of).items():
        if name.startswith(("embedding.", "output_layer.")):
            tensor = tensor[: arch.vocab_size]
        rule = rules[name]
        whole |= dict(zip(rule.hf_names, to_hf(rule, arch, tensor), strict=True))
    return whole


def joined(
    run: Run, parameters: Mapping[str, Any], of: Callable[[torch.nn.Parameter], Tensor]
) -> dict[str, Tensor]:
    """`of(parameter)` of each rank's parameters, by name in the whole model, whole, everywhere."""
    groups = run.groups
    mine: dict[str, Any] = {}
    for name, parameter in parameters.items():
        is_sharded = getattr(parameter, "tensor_model_parallel", False)
        cut = parameter.partition_dim if is_sharded else None
        mine[name] = (cut, of(parameter).detach().float().cpu().clone())
    everyone: list[Any] = [None] * groups.world_size
    where = (groups.pipeline.rank(), groups.data_and_context.rank(), groups.tensor.rank())
    dist.all_gather_object(everyone, (where, mine))
    # The first of the ranks that hold copies: a tied embedding is on two pipeline stages.
    shards: dict[str, list[Any]] = {}
    stages: dict[str, int] = {}
    for (stage, copy, _), held in sorted(everyone, key=lambda item: item[0]):
        for name, entry in held.items():
            if copy == 0 and stages.setdefault(name, stage) == stage:
                shards.setdefault(name, []).append(entry)
    whole: dict[str, Tensor] = {}
    for name, entries in shards.items():
        cut, first = entries[0]
        parts = [tensor for _, tensor in entries]
        whole[name] = first if cut is None else _joined(name, parts, cut)
    return whole


def _joined(name: str, parts: list[Tensor], dim: int) -> Tensor:
    if "linear_fc1" not in name:
        return torch.cat(parts, dim=dim)
    gates, ups = zip(*(part.chunk(2, dim=dim) for part in parts), strict=True)
    return torch.cat([*gates, *ups], dim=dim)
