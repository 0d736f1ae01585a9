"""Process groups: the one file that starts torch.distributed and asks Megatron for its groups."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from megatron_longpo.parallel import cpu


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelSizes:
    """Degrees of model parallelism; data parallelism takes the rest of the world."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    context_inner: int = 1
    """Neighbouring context-parallel ranks that scatter heads: 1 = `all_gather`, all = `a2a`."""
    sequence: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """This rank's process groups. A group of one rank is a group, never None."""

    sizes: ParallelSizes
    tensor: ProcessGroup
    pipeline: ProcessGroup
    context: ProcessGroup
    context_inner: ProcessGroup
    """Ranks of `context` that scatter heads among themselves."""
    context_outer: ProcessGroup
    """Ranks of `context` that then hold the same heads, and gather keys."""
    data: ProcessGroup
    """Data-parallel ranks that hold the same tokens' shard, without context parallelism."""
    data_and_context: ProcessGroup
    device: torch.device

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints to the user."""
        return self.rank == 0

    def is_first_stage(self, chunk: int = 0) -> bool:
        """Returns whether chunk `chunk` of this rank holds the embedding."""
        return self.pipeline.rank() == 0 and chunk == 0

    def is_last_stage(self, chunk: int | None = None) -> bool:
        """Returns whether chunk `chunk` of this rank, None = its last one, computes the loss."""
        last_chunk = (self.sizes.virtual_pipeline or 1) - 1
        is_last_rank = self.pipeline.rank() == self.pipeline.size() - 1
        return is_last_rank and chunk in (None, last_chunk)


_started: Groups | None = None


def initialize(sizes: ParallelSizes, *, timeout_minutes: float = 60, seed: int = 42) -> Groups:
    """Starts torch.distributed (under torchrun, or alone) and Megatron's groups, and seeds.

    Groups use NCCL with GPUs, else gloo, and then Megatron's CUDA calls are answered on the CPU. A
    second call seeds again, and makes new groups if the sizes differ.
    """
    global _started
    if _started is not None and _started.sizes == sizes:
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        return _started
    if _started is not None:
        _started = None
        _end_groups()
    cpu.install()
    has_cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        if has_cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        timeout = timedelta(minutes=timeout_minutes)
        backend = "nccl" if has_cuda else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
            )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual_pipeline,
        context_parallel_size=sizes.context,
        # The distributed optimizer gathers its state for checkpoints over gloo.
        create_gloo_process_groups=True,
        distributed_timeout_minutes=math.ceil(timeout_minutes),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    context = parallel_state.get_context_parallel_group()
    inner_group, outer_group = _context_subgroups(context, sizes.context_inner, timeout_minutes)
    _started = Groups(
        sizes=sizes,
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        context=context,
        context_inner=inner_group,
        context_outer=outer_group,
        data=parallel_state.get_data_parallel_group(),
        data_and_context=parallel_state.get_data_parallel_group(with_context_parallel=True),
        device=torch.device("cuda", torch.cuda.current_device()) if has_cuda else cpu.CPU,
    )
    return _started


def megatron_groups() -> ProcessGroupCollection:
    """Returns the groups of `initialize` as Megatron's modules take them."""
    return ProcessGroupCollection.use_mpu_process_groups()


def _end_groups() -> None:
    """Ends all groups but the world's.

    Megatron's own `destroy` only forgets them: their threads and connections, dozens a layout,
    would last as long as the process.
    """
    dist.barrier()  # nobody waits in one of them any more
    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _context_subgroups(
    context: ProcessGroup, inner: int, timeout_minutes: float
) -> tuple[ProcessGroup, ProcessGroup]:
    """Makes this rank's group of `inner` neighbours, and its group across such groups.

    The second has the ranks at the same place of every first one. Megatron makes the same groups,
    but only where einops is installed.
    """
    assert context.size() % inner == 0, (context.size(), inner)
    if context.size() == 1:
        return context, context
    everyone: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, dist.get_process_group_ranks(context))
    mine: list[ProcessGroup] = []
    for ranks in sorted({tuple(members) for members in everyone}):
        inner_groups = [ranks[start : start + inner] for start in range(0, len(ranks), inner)]
        outer_groups = list(zip(*inner_groups, strict=True))
        for members in (*inner_groups, *outer_groups):
            # All ranks make all groups, in the same order.
            group = dist.new_group(list(members), timeout=timedelta(minutes=timeout_minutes))
            if dist.get_rank() in members:
                mine.append(group)
    inner_group, outer_group = mine
    return inner_group, outer_group


def shutdown() -> None:
    """Ends Megatron's groups and torch.distributed."""
    global _started
    _started = None
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
