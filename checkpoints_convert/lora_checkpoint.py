"""A checkpoint of LoRA adapters and its base, read a tensor at a time, also merged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_convert.fingerprint import weights_fingerprint
from checkpoints_convert.hf_folder import local_hf_folder
from checkpoints_convert.hf_weights import HfWeights
from checkpoints_convert.lora_record import LORA_NAME, LoraRecord
from checkpoints_convert.mapping import TensorRule, tensor_rules, to_hf
from checkpoints_convert.torch_dist import HF_FOLDER_NAME, TorchDistReader
from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import Architecture, read_architecture
from megatron_longpo.model.lora import ADAPTER_NAME


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
        scale = self.record.settings.scale
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
