"""The safetensors of a Hugging Face folder, read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints_convert.mapping import (
    TensorRule,
    tensor_rules,
    to_megatron,
)
from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import Architecture

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Stored dtypes that weights can be read from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor's entry in a safetensors header."""

    path: Path
    dtype: str
    """safetensors' name, such as `BF16`."""
    shape: tuple[int, ...]


class HfWeights:
    """The tensors of a Hugging Face folder by name, each read when it is needed.

    A file is open only while a tensor is read: the read parts of an open file count as memory of
    this process, and would in the end be the whole model.
    """

    def __init__(self, hf_folder: str) -> None:
        self.folder = Path(hf_folder)
        self._stored = self._find_tensors()

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    @property
    def names(self) -> list[str]:
        return list(self._stored)

    @property
    def num_bytes(self) -> int:
        """Size of the files."""
        paths = {stored.path for stored in self._stored.values()}
        return sum(path.stat().st_size for path in paths)

    @property
    def files(self) -> dict[str, Path]:
        """The file of each tensor, by the tensor's name."""
        return {name: stored.path for name, stored in self._stored.items()}

    def path_of(self, name: str) -> Path:
        return self._stored[name].path

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        stored = self._stored[name]
        if stored.dtype not in SAFETENSORS_DTYPES:
            raise UserError(
                f"{stored.path}: {name} has dtype {stored.dtype}; "
                f"supported: {', '.join(SAFETENSORS_DTYPES)} (unquantised weights)"
            )
        return SAFETENSORS_DTYPES[stored.dtype]

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Reads a whole tensor to the CPU; refuses NaN, infinity and a shape other than `shape`."""
        self.dtype(name)
        if shape is not None:
            self._check_shape(name, shape)
        path = self._stored[name].path
        with _open(path) as file:
            # A copy: the file's own tensor would keep it open.
            tensor = file.get_tensor(name).clone()
        if not all_finite(tensor):
            raise UserError(f"{path}: {name} holds NaN or infinity; the weights are damaged")
        return tensor

    def read_rule(self, rule: TensorRule, arch: Architecture) -> Tensor:
        """Reads a rule's tensors and returns the whole Megatron tensor, without padding."""
        return to_megatron(rule, arch, [self.read(name) for name in rule.hf_names])

    def check(self, arch: Architecture) -> None:
        """Raises `UserError` for a tensor that is missing, has another shape or an unknown dtype,
        or is not part of the model."""
        expected = {
            name: shape
            for rule in tensor_rules(arch)
            for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True)
        }
        for name, shape in sorted(expected.items()):
            if name not in self:
                raise UserError(
                    f"{self.folder}: tensor {name} is missing; the download is incomplete or "
                    "config.json belongs to another model"
                )
            self._check_shape(name, shape)
            self.dtype(name)
        for name in sorted(self._stored):
            if name not in expected and not is_ignored(name, arch):
                raise UserError(
                    f"{self.path_of(name)}: tensor {name} has no place in this architecture "
                    f"({arch.family}); config.json belongs to another model"
                )

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if self.shape(name) != shape:
            raise UserError(
                f"{self.path_of(name)}: {name} has shape {list(self.shape(name))}, config.json "
                f"asks for {list(shape)}; the weights belong to another config"
            )

    def _find_tensors(self) -> dict[str, StoredTensor]:
        index = self.folder / INDEX_NAME
        if index.is_file():
            return self._read_index(index)
        single = self.folder / WEIGHTS_NAME
        if single.is_file():
            return _read_header(single)
        if any(self.folder.glob("pytorch_model*.bin")):
            raise UserError(
                f"{self.folder}: weights are in torch .bin files only; convert them to "
                "safetensors first (load with transformers, then save_pretrained)"
            )
        raise UserError(f"{self.folder}: no {WEIGHTS_NAME} and no {INDEX_NAME} here")

    def _read_index(self, index: Path) -> dict[str, StoredTensor]:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index}: no readable weight_map; restore the file") from error
        headers: dict[str, dict[str, StoredTensor]] = {}
        for file in sorted(set(weight_map.values())):
            path = self.folder / file
            if not path.is_file():
                raise UserError(f"{path}: named in {INDEX_NAME} but missing; fetch it again")
            headers[file] = _read_header(path)
        for name, file in sorted(weight_map.items()):
            if name not in headers[file]:
                raise UserError(
                    f"{self.folder / file}: tensor {name} is missing, though the index names it"
                )
        return {name: headers[file][name] for name, file in weight_map.items()}


def _read_header(path: Path) -> dict[str, StoredTensor]:
    stored = {}
    with _open(path) as file:
        for name in file.keys():  # noqa: SIM118
            found = file.get_slice(name)
            stored[name] = StoredTensor(
                path=path, dtype=found.get_dtype(), shape=tuple(found.get_shape())
            )
    return stored


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        opened = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    with opened as file:
        yield file


def all_finite(tensor: Tensor) -> bool:
    """Tells whether there is no NaN and no infinity; in pieces, since torch makes copies."""
    return all(bool(torch.isfinite(piece).all()) for piece in tensor.view(-1).split(2**22))


def is_ignored(name: str, arch: Architecture) -> bool:
    """Tells whether a tensor is one that transformers does not read either."""
    return name.endswith("rotary_emb.inv_freq") or (
        arch.tied_embeddings and name == "lm_head.weight"
    )
