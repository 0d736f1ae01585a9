"""Exports a checkpoint of LoRA adapters as a PEFT adapter.

PEFT has a layer for each Hugging Face matrix. Matrices that Megatron fuses were trained with one A:
each of them gets a copy of A, and its own rows of B.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from checkpoints_convert.destination import new_folder
from checkpoints_convert.hf_folder import (
    TOKENIZER_FILES,
    copy_files,
    write_hf_side_files,
)
from checkpoints_convert.hf_weights import INDEX_NAME
from checkpoints_convert.lora_checkpoint import LoraCheckpoint
from checkpoints_convert.lora_record import LoraRecord
from checkpoints_convert.mapping import tensor_rules
from checkpoints_convert.torch_dist import HF_FOLDER_NAME
from megatron_longpo.config.convert import ExportConfig
from megatron_longpo.model.spec import DTYPES

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
BASE_NAME = "base"
"""Inside an adapter's folder: the base model with the positions of the adapter's training."""

PEFT_MODULES = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}

README = """\
# LoRA adapter

For PEFT, on {base}. With peft installed, transformers loads base and adapter together:

    model = AutoModelForCausalLM.from_pretrained("{folder}")
"""
README_ROPE = """
The adapter was trained under a RoPE or positions that are not the original model's (rope_theta
{theta:g}, max_position_embeddings {positions}). `{base_name}/` is that model with these settings:
its config.json is changed, its weights are links to those of {original}. On the original folder
the adapter would load without a word and answer worse.

If either folder moves, write its new place into `base_model_name_or_path` of
{config}, or renew the links.
"""


def export_adapter(checkpoint: LoraCheckpoint, config: ExportConfig) -> str:
    """Writes a PEFT folder. Adapters are small, so all are in memory at once.

    Returns:
        A line about what was written.
    """
    dtype = DTYPES[config.dtype] if config.dtype else checkpoint.dtype
    final = Path(config.destination).expanduser().absolute()
    with new_folder(
        config.destination, overwrite=config.overwrite, replaceable=_is_adapter_folder
    ) as folder:
        tensors = {
            name: tensor.to(dtype).contiguous() for name, tensor in _peft_tensors(checkpoint)
        }
        path = folder / ADAPTER_WEIGHTS_NAME
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path, metadata={"format": "pt"})
        # safetensors lets only the owner read its files, whatever the umask.
        path.chmod(mode)
        copy_files(checkpoint.reader.folder / HF_FOLDER_NAME, folder, TOKENIZER_FILES)
        base = checkpoint.base_place
        readme = README
        if checkpoint.changes_rope:
            _write_base(checkpoint, folder / BASE_NAME)
            base = str(final / BASE_NAME)
            readme += README_ROPE
        text = json.dumps(_adapter_config(checkpoint.record, base), indent=2) + "\n"
        (folder / ADAPTER_CONFIG_NAME).write_text(text, encoding="utf-8")
        readme = readme.format(
            base=base,
            folder=final,
            theta=checkpoint.arch.rope.theta,
            positions=checkpoint.arch.max_position_embeddings,
            base_name=BASE_NAME,
            original=checkpoint.base_place,
            config=ADAPTER_CONFIG_NAME,
        )
        (folder / "README.md").write_text(readme, encoding="utf-8")
    return f"{config.destination}: adapter of rank {checkpoint.record.rank}, {dtype}, for {base}"


def _peft_tensors(checkpoint: LoraCheckpoint) -> Iterator[tuple[str, Tensor]]:
    for rule in tensor_rules(checkpoint.arch):
        if not checkpoint.has_adapter(rule):
            continue
        a, parts = checkpoint.adapter(rule)
        for name, b in zip(rule.hf_names, parts, strict=True):
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            # safetensors refuses tensors that share memory.
            yield f"{prefix}.lora_A.weight", a.clone()
            yield f"{prefix}.lora_B.weight", b


def _adapter_config(record: LoraRecord, base: str) -> dict[str, Any]:
    modules = [name for target in record.targets for name in PEFT_MODULES[target]]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": record.rank,
        "lora_alpha": int(record.alpha) if float(record.alpha).is_integer() else record.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "target_modules": modules,
        "inference_mode": True,
    }


def _write_base(checkpoint: LoraCheckpoint, folder: Path) -> None:
    """Writes the base model with the policy's positions: a config, and links to the weights."""
    original = checkpoint.base.folder
    write_hf_side_files(original, folder, checkpoint.arch)
    for path in sorted({checkpoint.base.path_of(name) for name in checkpoint.base.names}):
        (folder / path.name).symlink_to(path.resolve())
    if (original / INDEX_NAME).is_file():
        shutil.copyfile(original / INDEX_NAME, folder / INDEX_NAME)


def _is_adapter_folder(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG_NAME).is_file()
