"""Settings of `longpo convert import` and `longpo convert export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig:
    """A Hugging Face model becomes a Megatron checkpoint of iteration 0."""

    source: str
    """Hugging Face folder or hub id to read."""
    destination: str
    """Folder to make: `iter_0000000/` and `latest_checkpointed_iteration.txt`."""
    dtype: Literal["bf16", "fp32"] | None = None
    """What to store the weights as. null = as in the source."""
    overwrite: bool = False
    """Replace a destination that is not empty, if it is an earlier import."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """A Megatron checkpoint, imported or trained, becomes a Hugging Face folder."""

    source: str
    """An `iter_*` folder, or its parent: then the latest iteration is taken."""
    destination: str
    """Hugging Face folder to make."""
    dtype: Literal["bf16", "fp32"] | None = None
    """What to store the weights as. null = as in the checkpoint."""
    overwrite: bool = False
    """Replace a destination that is not empty, if it is a Hugging Face folder."""
    max_shard_size: str = "5GB"
    """Largest safetensors file, such as `500MB` or `5GB`."""
    lora: Literal["merged", "adapter"] = "merged"
    """Of a LoRA checkpoint: the whole model with the adapters in it, or a folder for PEFT."""
    base: str | None = None
    """Hugging Face folder or hub id of a LoRA checkpoint's base model, if it has moved."""
