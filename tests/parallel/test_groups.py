from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_longpo.parallel import groups
from megatron_longpo.parallel.groups import Groups, ParallelSizes


def test_a_world_of_one_has_every_group(single_process: Groups) -> None:
    for name in ("tensor", "pipeline", "context", "data", "data_and_context"):
        group = getattr(single_process, name)
        assert (group.rank(), group.size()) == (0, 1), name
    assert (single_process.rank, single_process.world_size) == (0, 1)
    assert single_process.is_main
    assert single_process.is_first_stage() and single_process.is_last_stage()
    assert single_process.sizes == ParallelSizes()
    assert dist.is_initialized()


def test_megatrons_modules_get_the_same_groups(single_process: Groups) -> None:
    theirs = groups.megatron_groups()
    for name, ours in {
        "tp": single_process.tensor,
        "pp": single_process.pipeline,
        "cp": single_process.context,
        "dp": single_process.data,
        "dp_cp": single_process.data_and_context,
    }.items():
        assert getattr(theirs, name) is ours, name


def test_starting_again_only_seeds(single_process: Groups) -> None:
    def draw() -> torch.Tensor:
        with get_cuda_rng_tracker().fork():
            return torch.rand(4)

    draws = []
    for seed in (1, 2, 1):
        assert groups.initialize(ParallelSizes(), seed=seed) is single_process
        draws.append(draw())
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])
