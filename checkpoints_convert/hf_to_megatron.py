"""`longpo convert import`: converts a Hugging Face folder to a Megatron checkpoint.

python -m checkpoints_convert.hf_to_megatron SRC_HF DST_MEGATRON
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor

from checkpoints_convert.destination import new_folder
from checkpoints_convert.hf_folder import local_hf_folder, write_hf_side_files
from checkpoints_convert.hf_weights import HfWeights
from checkpoints_convert.mapping import TensorRule, local_shard, tensor_rules
from checkpoints_convert.torch_dist import (
    HF_FOLDER_NAME,
    TRACKER_NAME,
    is_import_result,
    iteration_folder,
)
from checkpoints_convert.torch_dist_writer import Part, write_torch_dist
from megatron_longpo.config.convert import ImportConfig
from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import Architecture, read_architecture
from megatron_longpo.model.spec import (
    DTYPES,
    build_gpt,
    padded_vocab_size,
    transformer_config,
)
from megatron_longpo.parallel import groups
from megatron_longpo.parallel.groups import Groups


class NoAttention(torch.nn.Module):
    """Takes the place of core attention, which has no weights: a conversion runs no layer."""

    def __init__(self, **_: Any) -> None:
        super().__init__()


def run_import(config: ImportConfig) -> None:
    """Imports a checkpoint and prints what was written."""
    print(import_checkpoint(config))


def import_checkpoint(config: ImportConfig) -> str:
    """Writes `config.destination` in the format of contract.md section 6, without optimizer state.

    Returns:
        A line about what was written.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("convert import runs in one process; start it without torchrun")
    source = local_hf_folder(config.source)
    arch = read_architecture(source)
    weights = HfWeights(source)
    weights.check(arch)
    dtype = config.dtype or stored_dtype(weights)
    with new_folder(
        config.destination, overwrite=config.overwrite, replaceable=is_import_result
    ) as folder:
        iteration = iteration_folder(folder, 0)
        iteration.mkdir()
        with single_process():
            objects = _stock_objects(arch)
        write_torch_dist(
            iteration,
            _parts(arch, weights, DTYPES[dtype]),
            objects=objects,
            common={"iteration": 0, "checkpoint_version": 3.0},
        )
        torch_name = str(DTYPES[dtype]).removeprefix("torch.")
        write_hf_side_files(source, iteration / HF_FOLDER_NAME, arch, dtype=torch_name)
        (folder / TRACKER_NAME).write_text("0\n", encoding="utf-8")
    return f"{config.destination}: {arch.family}, {arch.num_layers} layers, {dtype}, iteration 0"


def stored_dtype(weights: HfWeights) -> Literal["bf16", "fp32"]:
    """Returns the dtype that keeps every tensor's values: fp32 if any tensor has it."""
    dtypes = {weights.dtype(name) for name in weights.names}
    if torch.float32 in dtypes:
        return "fp32"
    if dtypes == {torch.bfloat16}:
        return "bf16"
    raise UserError(
        f"{weights.folder}: weights are stored as {' and '.join(sorted(map(str, dtypes)))}, which "
        "training does not use; give --dtype bf16 or --dtype fp32"
    )


def _parts(arch: Architecture, weights: HfWeights, dtype: torch.dtype) -> list[Part]:
    """Returns the whole model's tensors, to be read when they are written."""
    padded_rows = padded_vocab_size(arch, 1)

    def make(rule: TensorRule) -> Tensor:
        whole = weights.read_rule(rule, arch)
        whole = local_shard(rule, whole, rank=0, size=1, padded_vocab_size=padded_rows)
        return whole.to(dtype)

    return [
        Part(
            key=rule.checkpoint_key,
            shape=(padded_rows, *rule.shape[1:]) if rule.kind == "vocab" else rule.shape,
            dtype=dtype,
            make=functools.partial(make, rule),
            layer=rule.layer,
            num_layers=None if rule.layer is None else arch.num_layers,
        )
        for rule in tensor_rules(arch)
    ]


def _stock_objects(arch: Architecture) -> dict[str, Any]:
    """Returns what a stock model saves beside its tensors: empty extra states, which it requires.

    Needs Megatron's process groups. The model is built without storage.
    """
    with torch.device("meta"):
        model = build_gpt(arch, transformer_config(arch), core_attention=NoAttention)
    state = model.sharded_state_dict()
    expected = {rule.checkpoint_key for rule in tensor_rules(arch)}
    objects = {v.unique_key: v.data for v in state.values() if isinstance(v, ShardedObject)}
    keys = {v.key for v in state.values() if not isinstance(v, ShardedObject)}
    assert keys == expected, keys ^ expected
    return objects


@contextmanager
def single_process() -> Iterator[Groups]:
    """Starts Megatron's groups for one process, and ends them unless they existed before."""
    had_groups = dist.is_initialized()
    started = groups.initialize(groups.ParallelSizes())
    try:
        yield started
    finally:
        if not had_groups:
            groups.shutdown()


if __name__ == "__main__":
    from megatron_longpo.cli import main

    sys.exit(main(["convert", "import", *sys.argv[1:]]))
