"""Computes parallel degrees, and the split of layers and heads, from config and models."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron_longpo.config.train import ParallelConfig
from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import Architecture
from megatron_longpo.model.spec import check_stages, check_tensor_size
from megatron_longpo.parallel.groups import ParallelSizes
from megatron_longpo.parallel.head_shares import kv_repeats, largest_inner
from megatron_longpo.parallel.stages import Split


def parallel_sizes(
    parallel: ParallelConfig, architectures: Sequence[Architecture]
) -> ParallelSizes:
    """Returns the degrees for a run that builds these models."""
    return ParallelSizes(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        context=parallel.context,
        context_inner=context_inner(parallel, architectures),
        sequence=bool(parallel.sequence),
    )


def check_split(parallel: ParallelConfig, architectures: Sequence[Architecture]) -> None:
    """Raises a UserError for parallel sizes that one of the models cannot be split by."""
    for arch in architectures:
        check_tensor_size(arch, parallel.tensor)
    context_inner(parallel, architectures)


def check_every_rank_has_layers(parallel: ParallelConfig, split: Split) -> None:
    """Raises a UserError for a pipeline rank without layers, which would train no adapter."""
    pipeline = parallel.pipeline
    for rank in range(pipeline):
        if not sum(split[rank::pipeline]):
            raise UserError(
                f"parallel.pipeline_layout ({parallel.pipeline_layout}): with lora, "
                f"pipeline rank {rank} would have nothing to train. Give it a layer (t)"
            )


def stage_split(parallel: ParallelConfig, policy: Architecture) -> Split:
    """Returns the policy's layers on each pipeline stage; other models are split like it."""
    return check_stages(
        policy,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        layout=parallel.pipeline_layout,
    )


def context_inner(parallel: ParallelConfig, architectures: Sequence[Architecture]) -> int:
    """Returns how many neighbouring context-parallel ranks scatter heads among themselves.

    Raises:
        UserError: if the heads of one of the models cannot be divided so.
    """
    if parallel.context_comm == "all_gather":
        return 1
    heads = [heads_per_rank(arch, parallel.tensor) for arch in architectures]
    if parallel.context_comm == "a2a":
        key, inner = "parallel.context", parallel.context
    elif parallel.context_inner is None:
        # Ranks of one machine: the tensor-parallel ones are next to each other, then these.
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", parallel.tensor * parallel.context))
        return largest_inner(parallel.context, heads, neighbours=ranks_here // parallel.tensor)
    else:
        key, inner = "parallel.context_inner", parallel.context_inner
    for num_heads, num_kv_heads in heads:
        kv_repeats(num_heads, num_kv_heads, inner, key=key)
    return inner


def heads_per_rank(arch: Architecture, tensor: int) -> tuple[int, int]:
    """Returns heads and key/value heads of one tensor-parallel rank, at least one of each."""
    return arch.num_heads // tensor, max(1, arch.num_kv_heads // tensor)
