"""Megatron's DDP around a model that trains: gradients are summed, sharded weights gathered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer

from megatron_longpo.config.train import OptimizerConfig


def wrap_in_ddp(model: Sequence[Any], config: OptimizerConfig) -> list[Any]:
    """Returns this rank's chunks, each in Megatron's DDP."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.grad_dtype == "fp32",
        use_distributed_optimizer=config.distributed,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather,
        average_in_collective=False,
    )
    return [
        # Communication of later chunks overlaps with the first's compute as it is.
        DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(model)
    ]


def connect(model: Sequence[Any], optimizer: MegatronOptimizer) -> None:
    """Tells Megatron's schedule how to scale the loss, sum gradients and finish them."""
    for chunk in model:
        if chunk.ddp_config.overlap_grad_reduce:
            # Gradients are summed with the last microbatch's backward, not with every one's.
            waits = [other.no_sync for other in model]
            chunk.config.no_sync_func = waits if len(waits) > 1 else waits[0]
        chunk.config.grad_scale_func = optimizer.scale_loss
        chunk.config.finalize_model_grads_func = finalize_model_grads


def gather_parameters(model: Sequence[Any]) -> None:
    """Makes this rank's weights those that the last optimizer step left.

    With `optimizer.overlap_param_gather` the next forward does so. Whatever reads weights before
    that, such as a checkpoint, would find old ones.
    """
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
