"""`longpo convert import`: a Hugging Face folder becomes a Megatron checkpoint.

python -m checkpoints_convert.hf_to_megatron SRC_HF DST_MEGATRON
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from checkpoints_convert.config import ImportConfig
from checkpoints_convert.destination import new_folder
from checkpoints_convert.hf_folder import local_hf_folder, write_hf_side_files
from checkpoints_convert.hf_weights import HfWeights, load_hf_weights
from checkpoints_convert.torch_dist import (
    HF_FOLDER_NAME,
    TRACKER_NAME,
    is_import_result,
    iteration_folder,
)
from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import Architecture, read_architecture
from megatron_longpo.model.spec import DTYPES, build_gpt, transformer_config
from megatron_longpo.parallel import groups


class NoAttention(torch.nn.Module):
    """Stands where the core attention would: it has no weights, and a conversion runs no layer."""

    def __init__(self, **_: Any) -> None:
        super().__init__()


def run_import(config: ImportConfig) -> None:
    """Writes `config.destination` as contract.md section 6 has it, without optimizer state."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("convert import runs in one process; start it without torchrun")
    source = local_hf_folder(config.source)
    arch = read_architecture(source)
    weights = HfWeights(source)
    weights.check_names(arch)
    dtype = config.dtype or stored_dtype(weights)
    with new_folder(
        config.destination, overwrite=config.overwrite, replaceable=is_import_result
    ) as folder:
        iteration = iteration_folder(folder, 0)
        iteration.mkdir()
        with _single_process():
            _save_weights(arch, source, str(iteration), dtype)
        torch_name = str(DTYPES[dtype]).removeprefix("torch.")
        write_hf_side_files(source, iteration / HF_FOLDER_NAME, arch, dtype=torch_name)
        (folder / TRACKER_NAME).write_text("0\n", encoding="utf-8")
    print(f"{config.destination}: {arch.family}, {arch.num_layers} layers, {dtype}, iteration 0")


def stored_dtype(weights: HfWeights) -> Literal["bf16", "fp32"]:
    """The dtype that keeps every tensor's values: fp32 if any tensor has it."""
    dtypes = {weights.dtype(name) for name in weights.names}
    if torch.float32 in dtypes:
        return "fp32"
    if dtypes == {torch.bfloat16}:
        return "bf16"
    raise UserError(
        f"{weights.folder}: weights are stored as {' and '.join(sorted(map(str, dtypes)))}, which "
        "training does not use; give --dtype bf16 or --dtype fp32"
    )


def _save_weights(
    arch: Architecture, source: str, iteration: str, dtype: Literal["bf16", "fp32"]
) -> None:
    model = build_gpt(arch, transformer_config(arch, dtype=dtype), core_attention=NoAttention)
    load_hf_weights(model, arch, source)
    state = {"model": model.sharded_state_dict(), "iteration": 0, "checkpoint_version": 3.0}
    dist_checkpointing.save(state, iteration)


@contextmanager
def _single_process() -> Iterator[None]:
    """Megatron's groups for a world of one, or those that the caller has started."""
    if dist.is_initialized():
        yield
        return
    groups.initialize(groups.ParallelSizes())
    try:
        yield
    finally:
        groups.shutdown()


if __name__ == "__main__":
    from megatron_longpo.cli import main

    sys.exit(main(["convert", "import", *sys.argv[1:]]))
