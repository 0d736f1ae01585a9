"""Finds Megatron `torch_dist` checkpoint folders and reads them without a model."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_longpo.errors import UserError

TRACKER_NAME = "latest_checkpointed_iteration.txt"
HF_FOLDER_NAME = "hf"
"""Inside an iteration's folder: config, tokenizer and chat template of the saved model."""


def iteration_folder(parent: str | Path, iteration: int) -> Path:
    return Path(parent) / f"iter_{iteration:07d}"


def find_iteration_folder(source: str) -> Path:
    """Returns `source` if it is a checkpoint itself, else its latest iteration."""
    folder = Path(source).expanduser()
    tracker = folder / TRACKER_NAME
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8").strip()
        if not text.isdecimal():
            raise UserError(f"{tracker}: expected the number of an iteration, found {text!r}")
        folder = iteration_folder(folder, int(text))
    if not (folder / ".metadata").is_file():
        raise UserError(
            f"{folder}: no torch_dist checkpoint here; give an iter_* folder, or its parent with "
            f"{TRACKER_NAME}"
        )
    return folder


def is_import_result(folder: Path) -> bool:
    """Tells whether the folder has iteration 0 and nothing else, as an import writes it."""
    iterations = [path.name for path in folder.iterdir() if re.fullmatch(r"iter_\d+", path.name)]
    others = {path.name for path in folder.iterdir()} - {TRACKER_NAME, *iterations}
    return iterations == [iteration_folder("", 0).name] and not others


class TorchDistReader:
    """The tensors of one iteration's folder by key. Needs no process group and no model."""

    def __init__(self, folder: Path) -> None:
        self._reader = FileSystemReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self.folder = folder

    @property
    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensor(key).size)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensor(key).properties.dtype

    def read(self, key: str, *, layer: int | None = None) -> Tensor:
        """Reads a whole tensor, whichever ranks wrote it, or row `layer` of a stack over layers."""
        stored = self._tensor(key)
        offsets = [0] * len(stored.size)
        sizes = list(stored.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        box = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, stored, [box])
        if sum(math.prod(item.lengths) for item in items) != math.prod(sizes):
            raise UserError(f"{self.folder}: tensor {key} is incomplete; a rank's file is missing")
        target = torch.empty(sizes, dtype=stored.properties.dtype)
        self._reader.read_data(LoadPlan(items), _IntoOneTensor(target)).wait()
        return target if layer is None else target[0]

    def _tensor(self, key: str) -> TensorStorageMetadata:
        if key not in self._tensors:
            raise UserError(
                f"{self.folder}: tensor {key} is missing; {HF_FOLDER_NAME}/config.json belongs to "
                "another model"
            )
        return self._tensors[key]


class _IntoOneTensor(DefaultLoadPlanner):
    """Lets a storage reader fill one tensor with a box of the stored one."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        result = self._target
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            result = result.narrow(dim, start, length)
        return result

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass
