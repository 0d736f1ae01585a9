"""Writes a Megatron `torch_dist` checkpoint tensor by tensor, without a model in memory.

Megatron's own writer needs a state dict with all tensors in memory. The format is that of
torch.distributed.checkpoint, whose file writer requests one tensor after the other.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

COMMON_NAME = "common.pt"
"""Megatron's file for values that are not tensors; optional since 0.19."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A tensor of the checkpoint, or one layer's row of a stack over layers."""

    key: str
    shape: tuple[int, ...]
    """Shape of the part itself, without the dimension of the stack."""
    dtype: torch.dtype
    make: Callable[[], Tensor]
    """Makes the tensor, with that shape and dtype, when it is written."""
    layer: int | None = None
    num_layers: int | None = None

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Offsets and sizes of the part in the whole tensor."""
        if self.layer is None:
            offsets, sizes = (0,) * len(self.shape), self.shape
        else:
            offsets, sizes = (self.layer, *(0,) * len(self.shape)), (1, *self.shape)
        return ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))

    @property
    def item(self) -> WriteItem:
        """The request to write the part."""
        chunk = self.chunk
        whole = self.shape if self.num_layers is None else (self.num_layers, *self.shape)
        return WriteItem(
            index=MetadataIndex(self.key, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=chunk, properties=TensorProperties(dtype=self.dtype), size=torch.Size(whole)
            ),
        )


def write_torch_dist(
    folder: Path,
    parts: Sequence[Part],
    *,
    objects: Mapping[str, Any],
    common: Mapping[str, Any],
) -> None:
    """Writes a checkpoint into the empty folder of an iteration, one part in memory at a time.

    An error that a part's `make` raises is passed on.

    Args:
        folder: an `iter_*` folder.
        parts: all tensors, with every stack complete, in the order in which they are written.
        objects: Megatron's sharded objects by their unique keys.
        common: values that `dist_checkpointing.load` returns beside the requested tensors.
    """
    items = [part.item for part in parts]
    items += [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in objects]
    writer = FileSystemWriter(folder, thread_count=1, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(True)
    (plan,), metadata = create_default_global_save_plan([SavePlan(items)])
    (plan,) = writer.prepare_global_plan([writer.prepare_local_plan(plan)])
    results = writer.write_data(plan, _OnDemand(parts, objects)).wait()
    writer.finish(metadata, [results])
    torch.save(dict(common), folder / COMMON_NAME)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class _OnDemand(DefaultSavePlanner):
    """Makes the tensors and objects that the writer requests."""

    def __init__(self, parts: Sequence[Part], objects: Mapping[str, Any]) -> None:
        super().__init__()
        self._parts = {(part.key, part.chunk.offsets): part for part in parts}
        self._objects = objects

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        index = write_item.index
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            # A list, since Megatron stores all of a rank's objects of one key together.
            torch.save([self._objects[index.fqn]], stream)
            return stream
        assert index.offset is not None
        part = self._parts[index.fqn, index.offset]
        tensor = part.make()
        assert tensor.shape == part.shape and tensor.dtype == part.dtype, index
        return tensor.reshape(part.chunk.sizes).contiguous()
