"""Reads the weights of a Megatron checkpoint, trained or imported, with adapters merged."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from checkpoints_convert.gpt_weights import write_parameters
from checkpoints_convert.hf_weights import all_finite
from checkpoints_convert.lora_checkpoint import LoraCheckpoint, open_lora_checkpoint
from checkpoints_convert.lora_record import read_lora_record
from checkpoints_convert.mapping import TensorRule, tensor_rules, to_hf, to_megatron
from checkpoints_convert.torch_dist import HF_FOLDER_NAME, TorchDistReader, find_iteration_folder
from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import Architecture, read_architecture

MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
"""Beginnings of the model's keys; a checkpoint also has optimizer and RNG entries."""

Reader = Callable[[TensorRule], list[Tensor]]
"""Returns the whole Hugging Face tensors of a rule."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenCheckpoint:
    """One iteration, opened to be read one tensor at a time."""

    iteration: Path
    arch: Architecture
    """The policy, with the RoPE of its training."""
    dtype: torch.dtype
    read: Reader
    lora: LoraCheckpoint | None
    """The adapters, which `read` merges; None if the checkpoint has whole weights."""

    @property
    def hf_folder(self) -> Path:
        """Config, tokenizer and chat template."""
        return self.iteration / HF_FOLDER_NAME


def open_checkpoint(
    source: str, *, base: str | None = None, base_option: str = "--base"
) -> OpenCheckpoint:
    """Opens an iteration, or the newest one of a folder, and checks its keys.

    `base` is the folder or hub id of the adapters' base, if it has moved since it was recorded.
    `base_option` is the user's option for it, for messages.
    """
    iteration = find_iteration_folder(source)
    arch = read_architecture(str(iteration / HF_FOLDER_NAME))
    reader = TorchDistReader(iteration)
    record = read_lora_record(iteration)
    if record is not None:
        lora = open_lora_checkpoint(reader, record, arch, base=base, base_option=base_option)
        return OpenCheckpoint(
            iteration=iteration, arch=arch, dtype=lora.dtype, read=lora.merged, lora=lora
        )
    _check_keys(reader, arch)
    return OpenCheckpoint(
        iteration=iteration,
        arch=arch,
        dtype=_common_dtype(reader, arch),
        read=functools.partial(_read, reader, arch),
        lora=None,
    )


def load_checkpoint_weights(
    checkpoint: OpenCheckpoint, gpt_model: GPTModel, arch: Architecture
) -> None:
    """Writes every parameter of this rank's `gpt_model` from a checkpoint of any layout.

    Each rank reads only what it needs, one tensor at a time. `arch` is the checkpoint's, but its
    RoPE may differ.
    """
    # A tied output layer is not in the checkpoint: it is the embedding.
    stored = {rule.hf_names: rule for rule in tensor_rules(arch)}

    def whole(rule: TensorRule) -> Tensor:
        return to_megatron(rule, arch, checkpoint.read(stored[rule.hf_names]))

    write_parameters(gpt_model, arch, whole)


def _check_keys(reader: TorchDistReader, arch: Architecture) -> None:
    expected = set()
    for rule in tensor_rules(arch):
        expected.add(rule.checkpoint_key)
        shape = reader.shape(rule.checkpoint_key)
        wanted = rule.shape if rule.layer is None else (arch.num_layers, *rule.shape)
        if rule.kind == "vocab":
            matches = shape[1:] == wanted[1:] and shape[0] >= wanted[0]
        else:
            matches = shape == wanted
        if not matches:
            raise UserError(
                f"{reader.folder}: tensor {rule.checkpoint_key} has shape {list(shape)}, "
                f"{HF_FOLDER_NAME}/config.json asks for {list(wanted)}"
            )
    for key in reader.keys:
        if key.startswith(MODEL_PREFIXES) and key not in expected:
            raise UserError(
                f"{reader.folder}: tensor {key} has no place in this architecture ({arch.family})"
            )


def _common_dtype(reader: TorchDistReader, arch: Architecture) -> torch.dtype:
    """Returns the checkpoint's dtype; the widest one if there are several."""
    dtypes = {reader.dtype(rule.checkpoint_key) for rule in tensor_rules(arch)}
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def _read(reader: TorchDistReader, arch: Architecture, rule: TensorRule) -> list[Tensor]:
    """Returns the rule's Hugging Face tensors."""
    stored = reader.read(rule.checkpoint_key, layer=rule.layer)
    if not all_finite(stored):
        where = "" if rule.layer is None else f" of layer {rule.layer}"
        raise UserError(
            f"{reader.folder}: tensor {rule.checkpoint_key}{where} holds NaN or infinity; the run "
            "has diverged or the checkpoint is damaged: export an earlier iteration"
        )
    return to_hf(rule, arch, stored)
