"""Settings of `longpo tokenize` and `longpo inspect`; imports neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class TokenizeConfig:
    """Turns preference examples (text) into rows (token ids); docs/data.md shows the forms."""

    examples: str
    """What `longpo generate` wrote, or a DPO set (prompt, chosen, rejected): a JSONL, JSON or
    Parquet file, a `datasets` or Parquet folder, or a hub id."""
    output: str
    """Where the rows go: a path that ends in .jsonl, or else a `datasets` folder."""
    tokenizer: str
    """The model's Hugging Face folder or hub id, or a sentencepiece model file."""
    format: Literal["auto", "longpo", "dpo"] = "auto"
    """How the examples are read: longpo = documents with turns, dpo = prompts with two answers,
    auto = by the columns of the first one."""
    split: str | None = None
    """Split of a hub id or a folder of splits; null = the only one, or train."""
    chat_template: str | None = None
    """Path of a Jinja file to use in place of the tokenizer's own chat template."""
    system: str | None = None
    """System prompt of every conversation that has none of its own; null for none."""
    max_length: int = 131072
    """Most tokens of a long row."""
    short_max_length: int = 32768
    """Most tokens of a short reference row; an example with a longer one is dropped."""
    too_long: Literal["truncate_document", "drop", "error"] = "truncate_document"
    """What happens to a long row over max_length: cut its document, drop the example, or stop.
    A DPO set does not say what is a document, so truncate_document drops there."""
    cut_from: Literal["middle", "tail"] = "middle"
    """Which part of a document is cut; never a question, an answer or a turn's chunk."""
    num_workers: int | None = None
    """Processes that tokenise; null = one for each CPU that this command may use, but no more than
    one for 16 examples. The output is the same whatever their number."""
    overwrite: bool = False
    """Replace an output that exists."""


@dataclass(kw_only=True)
class InspectConfig:
    """Shows rows or examples: what is shared, what is labelled, and how long they are."""

    rows: str
    """Rows, or the texts that they are made of (LongPO examples, a DPO set): a JSONL or JSON file,
    a `datasets` or Parquet folder, or a hub id."""
    tokenizer: str | None = None
    """Hugging Face folder, hub id or sentencepiece model file to show rows as text with; null shows
    ids."""
    row: int = 0
    """Index of the row or example that is shown."""
    max_chars: int = 300
    """Characters shown at each end of a long piece of text."""
    sample: int = 1000
    """Rows read for the statistics, spread evenly; 0 reads all."""
    html: str | None = None
    """Path of a page to write for a browser: samples to pick from, and the statistics."""
    html_samples: int = 12
    """Samples on that page, the one that is shown and others spread evenly."""
    overwrite: bool = False
    """Replace a page that exists."""
