"""Settings of `longpo convert import`, `export` and `verify`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_longpo.config.fields import limits


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


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """A Hugging Face model goes to Megatron and back, and is compared with itself."""

    source: str
    """Hugging Face folder or hub id to prove the converters on."""
    export: str | None = None
    """Hugging Face folder of a model that was trained from `source`. It then makes the round trip
    in place of `source`, and must have `source`'s tensors, tokenizer and config; weights and RoPE
    may differ."""
    dtype: Literal["bf16", "fp32"] | None = None
    """What to convert the weights to on the way. null = as in the source; required for fp16."""
    logits: bool = True
    """Compare logits with transformers', which takes 4 bytes a parameter of memory. false =
    compare files only, one tensor in memory at a time."""
    text: str | None = None
    """Text file of your own for tokenizer and logits, beside texts that come with Python."""
    max_tokens: int = field(default=256, metadata=limits(at_least=16))
    """Most tokens of each text that logits are compared on."""
    tolerance: float = field(default=1e-4, metadata=limits(at_least=0))
    """Largest difference between logits, times their standard deviation where that is over 1."""
    work_dir: str | None = None
    """Where to put a temporary import and export, each as large as the model, and the logits.
    null = the system's folder for temporary files."""
    json: bool = False
    """Print one JSON object instead of a table."""
