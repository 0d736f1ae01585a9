"""A checkpoint of LoRA adapters becomes a whole Hugging Face model, or a PEFT adapter.

PEFT has a layer for each Hugging Face matrix. Those that Megatron fuses were trained with one A:
each of them gets a copy of it, and its own rows of B.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints_convert.destination import new_folder
from checkpoints_convert.fingerprint import weights_fingerprint
from checkpoints_convert.hf_folder import (
    TOKENIZER_FILES,
    copy_files,
    local_hf_folder,
    write_hf_side_files,
)
from checkpoints_convert.hf_weights import INDEX_NAME, HfWeights
from checkpoints_convert.lora_record import LORA_NAME, LoraRecord
from checkpoints_convert.mapping import TensorRule, tensor_rules, to_hf
from checkpoints_convert.torch_dist import HF_FOLDER_NAME, TorchDistReader
from megatron_longpo.config.convert import ExportConfig
from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import Architecture, read_architecture
from megatron_longpo.model.lora import ADAPTER_NAME
from megatron_longpo.model.spec import DTYPES

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
BASE_NAME = "base"
"""Inside an adapter's folder: the base model with the positions that the adapter was trained on."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraCheckpoint:
    """A checkpoint with adapters, and the base they belong to, both read a tensor at a time."""

    reader: TorchDistReader
    record: LoraRecord
    arch: Architecture
    """The policy, with the RoPE that it was trained with."""
    base: HfWeights
    base_place: str
    """Where PEFT is to find the base: a folder (absolute) or a hub id."""
    changes_rope: bool
    """Whether the policy's RoPE or positions are not the base's own."""

    @property
    def dtype(self) -> torch.dtype:
        return self.reader.dtype(next(iter(_adapter_keys(self.record, self.arch))))

    def merged(self, rule: TensorRule) -> list[Tensor]:
        """The rule's Hugging Face tensors in fp32, with the update where they have one."""
        weights = [
            self.base.read(name, shape).float()
            for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True)
        ]
        if not self.has_adapter(rule):
            return weights
        a, parts = self.adapter(rule)
        scale = self.record.config.scale
        return [
            torch.addmm(weight, b.float(), a.float(), alpha=scale)
            for weight, b in zip(weights, parts, strict=True)
        ]

    def adapter(self, rule: TensorRule) -> tuple[Tensor, list[Tensor]]:
        """A [r, in], and B [out, r] of each of the rule's Hugging Face tensors."""
        a, b = (
            self.reader.read(_adapter_key(rule, leaf), layer=rule.layer)
            for leaf in ("lora_a", "lora_b")
        )
        for leaf, tensor in (("lora_a", a), ("lora_b", b)):
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"{self.reader.folder}: {_adapter_key(rule, leaf)} of layer {rule.layer} holds "
                    "NaN or infinity; choose an earlier checkpoint"
                )
        return a, to_hf(rule, self.arch, b)

    def has_adapter(self, rule: TensorRule) -> bool:
        return _target_of(rule) in self.record.targets


def open_lora_checkpoint(
    reader: TorchDistReader,
    record: LoraRecord,
    arch: Architecture,
    *,
    base: str | None,
    base_option: str = "--base",
) -> LoraCheckpoint:
    """Checks that the checkpoint has all of its adapters, and that the base is the recorded one.

    `base` says where the base model is, if not where it was recorded; `base_option` is how a user
    gives it, for messages.
    """
    expected = _adapter_keys(record, arch)
    for key, shape in expected.items():
        if reader.shape(key) != shape:
            raise UserError(
                f"{reader.folder}: tensor {key} has shape {list(reader.shape(key))}, {LORA_NAME} "
                f"and {HF_FOLDER_NAME}/config.json ask for {list(shape)}"
            )
    for key in reader.keys:
        if key.startswith("decoder.") and key not in expected:
            raise UserError(f"{reader.folder}: tensor {key} is not of the adapters in {LORA_NAME}")
    try:
        folder = local_hf_folder(base or record.base)
    except UserError as error:
        if base is not None:
            raise
        raise UserError(
            f"{error}; if the base model has moved, say where it is: {base_option}"
        ) from error
    if weights_fingerprint(folder) != record.base_fingerprint:
        raise UserError(
            f"{folder}: its weights are not those that the adapters of {reader.folder} were "
            f"trained on ({record.base}); give that model with {base_option}"
        )
    place = base or record.base
    return LoraCheckpoint(
        reader=reader,
        record=record,
        arch=arch,
        base=HfWeights(folder),
        base_place=str(Path(folder).absolute()) if Path(place).expanduser().is_dir() else place,
        changes_rope=read_architecture(folder).rope != arch.rope,
    )


def export_adapter(checkpoint: LoraCheckpoint, config: ExportConfig) -> str:
    """Writes a PEFT folder. Adapters are small: all of them are held at once.

    Returns:
        A line that says what was written.
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
    """The base model with the policy's positions: a config, and links to the weights."""
    original = checkpoint.base.folder
    write_hf_side_files(original, folder, checkpoint.arch)
    for path in sorted({checkpoint.base.path_of(name) for name in checkpoint.base.names}):
        (folder / path.name).symlink_to(path.resolve())
    if (original / INDEX_NAME).is_file():
        shutil.copyfile(original / INDEX_NAME, folder / INDEX_NAME)


def _adapter_keys(record: LoraRecord, arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Checkpoint keys of the adapters with their shapes, stacked over layers."""
    keys: dict[str, tuple[int, ...]] = {}
    for rule in tensor_rules(arch):
        if _target_of(rule) in record.targets:
            rows, columns = rule.shape
            keys[_adapter_key(rule, "lora_a")] = (arch.num_layers, record.rank, columns)
            keys[_adapter_key(rule, "lora_b")] = (arch.num_layers, rows, record.rank)
    return keys


def _adapter_key(rule: TensorRule, leaf: str) -> str:
    return f"{rule.checkpoint_key.removesuffix('.weight')}.{ADAPTER_NAME}.{leaf}"


def _target_of(rule: TensorRule) -> str | None:
    """The layer that the rule's tensor is the matrix of: `linear_qkv` and so on."""
    *_, layer, leaf = rule.megatron_name.split(".")
    return layer if leaf == "weight" else None


def _is_adapter_folder(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG_NAME).is_file()
