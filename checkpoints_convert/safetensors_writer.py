"""Writes a safetensors file tensor by tensor; the library's own writer needs all at once.

The format (huggingface.co/docs/safetensors): 8 bytes with the header's length, a JSON header with
dtype, shape and byte range of each tensor, then the tensors without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[Tensor],
    *,
    dtype: torch.dtype,
) -> None:
    """Writes `tensors`, in the order of `shapes`, one in memory at a time."""
    with path.open("wb") as file:
        file.write(_header(shapes, dtype))
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            assert tensor.shape == shape and tensor.dtype == dtype, name
            # numpy knows no bfloat16.
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    # transformers refuses files that do not say which library wrote them.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    # Tensors start at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
