"""Hugging Face safetensors, one tensor at a time, into this rank's GPTModel."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints_convert.mapping import (
    TensorRule,
    hf_shapes,
    local_shard,
    output_rule,
    tensor_rules,
    to_megatron,
)
from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import Architecture
from megatron_longpo.model.lora import is_adapter_parameter
from megatron_longpo.model.spec import padded_vocab_size

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Stored dtypes that weights can be read from."""


class HfWeights:
    """The tensors of a Hugging Face folder by name; only what is asked for is read."""

    def __init__(self, hf_folder: str) -> None:
        self.folder = Path(hf_folder)
        self._open_files: dict[Path, Any] = {}
        self._path_of = self._find_tensors()

    def __contains__(self, name: str) -> bool:
        return name in self._path_of

    @property
    def names(self) -> list[str]:
        return list(self._path_of)

    def path_of(self, name: str) -> Path:
        return self._path_of[name]

    def dtype(self, name: str) -> torch.dtype:
        stored = self._file(self._path_of[name]).get_slice(name).get_dtype()
        if stored not in SAFETENSORS_DTYPES:
            raise UserError(
                f"{self._path_of[name]}: {name} has dtype {stored}; "
                f"supported: {', '.join(SAFETENSORS_DTYPES)} (unquantised weights)"
            )
        return SAFETENSORS_DTYPES[stored]

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The whole tensor on the CPU, checked for its shape and for NaN and infinity."""
        path = self._path_of[name]
        self.dtype(name)
        tensor = self._file(path).get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{path}: {name} has shape {list(tensor.shape)}, config.json asks for "
                f"{list(shape)}; the weights belong to another config"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds NaN or infinity; the weights are damaged")
        return tensor

    def check_names(self, arch: Architecture) -> None:
        """Refuses a folder that lacks a tensor of the model, or has one that no rule reads."""
        expected = {name for rule in tensor_rules(arch) for name in rule.hf_names}
        for name in sorted(expected):
            if name not in self:
                raise UserError(
                    f"{self.folder}: tensor {name} is missing; the download is incomplete or "
                    "config.json belongs to another model"
                )
        for name in sorted(self._path_of):
            if name not in expected and not _is_ignored(name, arch):
                raise UserError(
                    f"{self._path_of[name]}: tensor {name} has no place in this architecture "
                    f"({arch.family}); config.json belongs to another model"
                )

    def _find_tensors(self) -> dict[str, Path]:
        index = self.folder / INDEX_NAME
        if index.is_file():
            return self._read_index(index)
        single = self.folder / WEIGHTS_NAME
        if single.is_file():
            return {name: single for name in self._file(single).keys()}  # noqa: SIM118
        if any(self.folder.glob("pytorch_model*.bin")):
            raise UserError(
                f"{self.folder}: weights are in torch .bin files only; convert them to "
                "safetensors first (load with transformers, then save_pretrained)"
            )
        raise UserError(f"{self.folder}: no {WEIGHTS_NAME} and no {INDEX_NAME} here")

    def _read_index(self, index: Path) -> dict[str, Path]:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index}: no readable weight_map; restore the file") from error
        paths = {name: self.folder / file for name, file in weight_map.items()}
        for path in sorted(set(paths.values())):
            if not path.is_file():
                raise UserError(f"{path}: named in {INDEX_NAME} but missing; fetch it again")
            stored = set(self._file(path).keys())
            for name in sorted(name for name, where in paths.items() if where == path):
                if name not in stored:
                    raise UserError(f"{path}: tensor {name} is missing, though the index names it")
        return paths

    def _file(self, path: Path) -> Any:
        if path not in self._open_files:
            try:
                self._open_files[path] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a readable safetensors file ({error})") from error
        return self._open_files[path]


def load_hf_weights(gpt_model: GPTModel, arch: Architecture, hf_folder: str) -> None:
    """Writes every parameter of this rank's `gpt_model` from the folder's safetensors.

    The model may be one pipeline chunk, split over tensor-parallel ranks and padded; each rank
    reads what it needs, one Hugging Face tensor at a time. Call it before the model is wrapped.
    """
    weights = HfWeights(hf_folder)
    weights.check_names(arch)
    size = gpt_model.config.tensor_model_parallel_size
    rank = gpt_model.tp_group.rank()
    with torch.no_grad():
        for parameter, rule in local_rules(gpt_model, arch):
            shapes = hf_shapes(rule, arch)
            parts = [
                weights.read(name, shape) for name, shape in zip(rule.hf_names, shapes, strict=True)
            ]
            shard = local_shard(
                rule,
                to_megatron(rule, arch, parts),
                rank=rank,
                size=size,
                padded_vocab_size=padded_vocab_size(arch, size),
            )
            assert shard.shape == parameter.shape, (rule, shard.shape, parameter.shape)
            parameter.copy_(shard)


def local_rules(
    gpt_model: GPTModel, arch: Architecture
) -> Iterator[tuple[torch.nn.Parameter, TensorRule]]:
    """The parameters of this rank's model with their rules, in the model's order; no adapters."""
    rules = {
        name: rule
        for rule in (*tensor_rules(arch), output_rule(arch))
        for name in (rule.megatron_name, rule.fused_name)
    }
    prefix = "decoder.layers."
    for name, parameter in gpt_model.named_parameters():
        if is_adapter_parameter(name):
            continue
        if name.startswith(prefix):
            local, rest = name.removeprefix(prefix).split(".", 1)
            layer = gpt_model.decoder.layers[int(local)].layer_number - 1
            name = f"{prefix}{layer}.{rest}"
        assert name in rules, f"no rule for parameter {name}"
        yield parameter, rules[name]


def _is_ignored(name: str, arch: Architecture) -> bool:
    """Tensors that transformers does not read either."""
    return name.endswith("rotary_emb.inv_freq") or (
        arch.tied_embeddings and name == "lm_head.weight"
    )
