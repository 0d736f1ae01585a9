"""The config of `longpo inspect`."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_longpo.config.fields import limits


@dataclass(kw_only=True)
class InspectConfig:
    """Shows rows or examples: what is shared, what is labelled, and how long they are."""

    rows: str
    """Rows, or the texts that they are made from (LongPO examples, a DPO set): a JSONL or JSON
    file, a `datasets` or Parquet folder, or a hub id."""
    split: str | None = None
    """Split of a hub id or a folder of splits; null = the only one, or train."""
    tokenizer: str | None = None
    """Hugging Face folder, hub id or sentencepiece model file, to show rows as text; null = show
    token ids."""
    row: int = field(default=0, metadata=limits(at_least=0))
    """Index of the row or example to show."""
    max_chars: int = field(default=300, metadata=limits(at_least=1))
    """Characters to show at each end of a long piece of text."""
    sample: int = field(default=1000, metadata=limits(at_least=0))
    """Rows to read for the statistics, spread evenly over the set; 0 = all."""
    html: str | None = None
    """Path of a page to write for a browser: samples to choose from, and the statistics."""
    html_samples: int = field(default=12, metadata=limits(at_least=1))
    """Samples on that page: the row or example that is shown, and others spread evenly."""
    overwrite: bool = False
    """Replace an existing page."""
