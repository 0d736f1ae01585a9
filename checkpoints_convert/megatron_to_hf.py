"""`longpo convert export`: converts a Megatron checkpoint to a Hugging Face folder.

python -m checkpoints_convert.megatron_to_hf SRC_MEGATRON DST_HF
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import torch

from checkpoints_convert.checkpoint_weights import Reader, open_checkpoint
from checkpoints_convert.destination import new_folder
from checkpoints_convert.hf_folder import write_hf_side_files
from checkpoints_convert.hf_weights import INDEX_NAME, WEIGHTS_NAME
from checkpoints_convert.lora_export import export_adapter
from checkpoints_convert.mapping import TensorRule, tensor_rules
from checkpoints_convert.safetensors_writer import write_safetensors
from megatron_longpo.config.convert import ExportConfig
from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import Architecture
from megatron_longpo.model.spec import DTYPES


def run_export(config: ExportConfig) -> None:
    """Exports a checkpoint and prints what was written."""
    print(export_checkpoint(config))


def export_checkpoint(config: ExportConfig) -> str:
    """Writes a Hugging Face folder that transformers 4 and 5 read.

    Returns:
        A line about what was written.
    """
    limit = parse_size(config.max_shard_size)
    checkpoint = open_checkpoint(config.source, base=config.base)
    arch = checkpoint.arch
    if checkpoint.lora is None:
        _refuse_lora_settings(config, checkpoint.iteration)
    elif config.lora == "adapter":
        return export_adapter(checkpoint.lora, config)
    dtype = DTYPES[config.dtype] if config.dtype else checkpoint.dtype
    with new_folder(
        config.destination, overwrite=config.overwrite, replaceable=_is_hf_folder
    ) as folder:
        _write_weights(checkpoint.read, arch, folder, dtype=dtype, limit=limit)
        write_hf_side_files(
            checkpoint.hf_folder, folder, arch, dtype=str(dtype).removeprefix("torch.")
        )
    return f"{config.destination}: {arch.family}, {arch.num_layers} layers, {dtype}"


def parse_size(text: str) -> int:
    """Returns the bytes of `500MB`, `5GB` (powers of ten, as in transformers) or a number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)?", text.strip(), re.IGNORECASE)
    size = 0
    if match:
        unit = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[(match[2] or "").upper()]
        size = int(float(match[1]) * unit)
    if size < 1:
        raise UserError(f"max_shard_size ({text}) must be a size such as 500MB or 5GB")
    return size


def _refuse_lora_settings(config: ExportConfig, iteration: Path) -> None:
    for key, is_set in (("lora", config.lora != "merged"), ("base", config.base is not None)):
        if is_set:
            raise UserError(
                f"{key} ({getattr(config, key)}): {iteration} has whole weights and no adapters; "
                "leave it out"
            )


def _write_weights(
    read: Reader,
    arch: Architecture,
    folder: Path,
    *,
    dtype: torch.dtype,
    limit: int,
) -> None:
    files = _plan_files(arch, dtype=dtype, limit=limit)
    weight_map: dict[str, str] = {}
    for number, rules in enumerate(files, start=1):
        name = WEIGHTS_NAME
        if len(files) > 1:
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        shapes = {
            hf_name: shape
            for rule in rules
            for hf_name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True)
        }
        tensors = (tensor.to(dtype) for rule in rules for tensor in read(rule))
        write_safetensors(folder / name, shapes, tensors, dtype=dtype)
        weight_map.update(dict.fromkeys(shapes, name))
    if len(files) > 1:
        total = sum(_bytes(rule, dtype) for rules in files for rule in rules)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (folder / INDEX_NAME).write_text(text, encoding="utf-8")


def _plan_files(arch: Architecture, *, dtype: torch.dtype, limit: int) -> list[list[TensorRule]]:
    """Deals the rules to files in order, each of at most `limit` bytes or one rule."""
    files: list[list[TensorRule]] = [[]]
    size = 0
    for rule in tensor_rules(arch):
        more = _bytes(rule, dtype)
        if files[-1] and size + more > limit:
            files.append([])
            size = 0
        files[-1].append(rule)
        size += more
    return files


def _bytes(rule: TensorRule, dtype: torch.dtype) -> int:
    return sum(math.prod(shape) for shape in rule.hf_shapes) * dtype.itemsize


def _is_hf_folder(folder: Path) -> bool:
    return (folder / "config.json").is_file()


if __name__ == "__main__":
    from megatron_longpo.cli import main

    sys.exit(main(["convert", "export", *sys.argv[1:]]))
