"""The configs of `longpo convert import`, `export` and `verify`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_longpo.config.fields import limits
from megatron_longpo.config.names import Dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig:
    """Turns a Hugging Face model into a Megatron checkpoint of iteration 0."""

    source: str
    """Hugging Face folder or hub id to read."""
    destination: str
    """Folder to write: `iter_0000000/` and `latest_checkpointed_iteration.txt`."""
    dtype: Dtype | None = None
    """Type to store the weights in; null = as in the source."""
    overwrite: bool = False
    """Replace a destination that is not empty, if it is an earlier import."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Turns a Megatron checkpoint, imported or trained, into a Hugging Face folder."""

    source: str
    """An `iter_*` folder, or its parent, from which the latest iteration is taken."""
    destination: str
    """Hugging Face folder to write."""
    dtype: Dtype | None = None
    """Type to store the weights in; null = as in the checkpoint."""
    overwrite: bool = False
    """Replace a destination that is not empty, if it is a Hugging Face folder."""
    max_shard_size: str = "5GB"
    """Largest safetensors file, such as `500MB` or `5GB`."""
    lora: Literal["merged", "adapter"] = "merged"
    """For a LoRA checkpoint: merged = the whole model with the adapters in its weights; adapter = a
    folder for PEFT."""
    base: str | None = None
    """Hugging Face folder or hub id of a LoRA checkpoint's base model, if it has moved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """Converts a Hugging Face model to Megatron and back, and compares it with itself."""

    source: str
    """Hugging Face folder or hub id to test the converters with."""
    export: str | None = None
    """Hugging Face folder of a model that was trained from `source`. If given, it is converted
    instead of `source`, and must have the tensors, tokenizer and config of `source`; weights and
    RoPE may differ."""
    dtype: Dtype | None = None
    """Type of the weights in between; null = as in the source. Required for fp16."""
    logits: bool = True
    """Compare logits with those of transformers, which takes 4 bytes of memory per parameter. false
    = compare files only, one tensor in memory at a time."""
    text: str | None = None
    """Your own text file to test tokenizer and logits with, in addition to texts of Python."""
    max_tokens: int = field(default=256, metadata=limits(at_least=16))
    """Maximum tokens of each text that logits are compared on."""
    tolerance: float = field(default=1e-4, metadata=limits(at_least=0))
    """Largest difference between logits that is accepted, multiplied by their standard deviation if
    that is above 1."""
    work_dir: str | None = None
    """Folder for a temporary import and export, each as large as the model, and the logits; null =
    the system's folder for temporary files."""
    json: bool = False
    """Print one JSON object instead of a table."""
