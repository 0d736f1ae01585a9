"""The config of `longpo tokenize`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_longpo.config.fields import limits
from megatron_longpo.config.names import CutFrom, RowTooLong, TextFormat


@dataclass(kw_only=True)
class TokenizeConfig:
    """Turns preference examples (text) into rows (token ids); docs/data.md shows the forms."""

    examples: str
    """What `longpo generate` wrote, or a DPO set (prompt, chosen, rejected): a JSONL, JSON or
    Parquet file, a `datasets` or Parquet folder, or a hub id."""
    output: str
    """Where to write the rows: a path that ends in .jsonl, or else a `datasets` folder."""
    tokenizer: str
    """The model's Hugging Face folder or hub id, or a sentencepiece model file."""
    format: Literal["auto", TextFormat] = "auto"
    """How the examples are read: longpo = documents with turns, dpo = prompts with two answers,
    auto = by the columns of the first one."""
    split: str | None = None
    """Split of a hub id or a folder of splits; null = the only one, or train."""
    chat_template: str | None = None
    """Path of a Jinja file that replaces the tokenizer's own chat template."""
    system: str | None = None
    """System prompt of every conversation that has none of its own; null = no system prompt."""
    max_length: int = field(default=131072, metadata=limits(at_least=2))
    """Maximum tokens of a long row."""
    short_max_length: int = field(default=32768, metadata=limits(at_least=2))
    """Maximum tokens of a short reference row; an example with a longer one is dropped."""
    too_long: RowTooLong = "truncate_document"
    """What happens to a long row over max_length: stop with an error, drop the example, or cut its
    document. A DPO set does not say what its document is, so there truncate_document drops."""
    cut_from: CutFrom = "middle"
    """Which part of a document is cut; never a question, an answer or a turn's chunk."""
    num_workers: int | None = field(default=None, metadata=limits(at_least=1))
    """Processes that tokenise; null = one per CPU that this command may use, and at most one per 16
    examples. The output does not depend on their number."""
    overwrite: bool = False
    """Replace an existing output."""
