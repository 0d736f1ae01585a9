"""Reads a checkpoint of LoRA adapters and its base, one tensor at a time, merged or not."""

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
    """A checkpoint with adapters and their base, both read one tensor at a time."""

    reader: TorchDistReader
    record: LoraRecord
    arch: Architecture
    """The policy, with the RoPE of its training."""
    base: HfWeights
    base_place: str
    """Where PEFT finds the base: an absolute folder or a hub id."""
    changes_rope: bool
    """Whether the policy's RoPE or positions differ from the base's."""

    @property
    def dtype(self) -> torch.dtype:
        return self.reader.dtype(next(iter(_adapter_keys(self.record, self.arch))))

    def merged(self, rule: TensorRule) -> list[Tensor]:
        """Returns the rule's Hugging Face tensors in fp32, adapters added."""
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
        """Returns A [r, in], and B [out, r] of each of the rule's Hugging Face tensors."""
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
        """Tells whether the rule's tensor is the matrix of a layer with an adapter."""
        return _target_of(rule) in self.record.targets


def open_lora_checkpoint(
    reader: TorchDistReader,
    record: LoraRecord,
    arch: Architecture,
    *,
    base: str | None,
    base_option: str = "--base",
) -> LoraCheckpoint:
    """Opens a checkpoint; checks that no adapter is missing and that the base is the recorded one.

    `base` is the folder or hub id of the base model, if it has moved from where it was recorded.
    `base_option` is the user's option for it, for messages.
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
    """Returns the checkpoint keys of the adapters and their shapes, stacked over layers."""
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
    """Returns the layer whose matrix is the rule's tensor, such as `linear_qkv`."""
    *_, layer, leaf = rule.megatron_name.split(".")
    return layer if leaf == "weight" else None
