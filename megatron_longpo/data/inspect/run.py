"""`longpo inspect`: shows rows or examples on the console and as a page for a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from megatron_longpo.config.inspect import InspectConfig
from megatron_longpo.data.inspect.console import show_sample, show_statistics
from megatron_longpo.data.inspect.page import write_page
from megatron_longpo.data.inspect.row_samples import sample_of_row
from megatron_longpo.data.inspect.samples import Sample
from megatron_longpo.data.inspect.statistics import row_statistics, text_statistics
from megatron_longpo.data.inspect.text_samples import sample_of_text
from megatron_longpo.data.jsonl import refuse_existing
from megatron_longpo.data.progress import track
from megatron_longpo.data.rows.dataset import RowDataset, open_rows
from megatron_longpo.data.rows.schema import LONG_COLUMNS
from megatron_longpo.data.rows.sources import open_source
from megatron_longpo.data.text.sets import TextSet
from megatron_longpo.data.text.tokenizers import load_tokenizer
from megatron_longpo.errors import UserError


def run_inspect(config: InspectConfig) -> None:
    """Prints one row or example and statistics over the set; writes the page if `html` is set."""
    if config.html is not None:
        refuse_existing(config.html, overwrite=config.overwrite, key="html")
    items = _open(config.rows, config.split)
    if config.row >= len(items):
        raise UserError(f"row ({config.row}): must be below the number of rows, {len(items)}")
    tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
    is_rows = isinstance(items, RowDataset)
    make_sample: Callable[[Any], Sample] = (
        (lambda row: sample_of_row(row, tokenizer)) if is_rows else sample_of_text
    )
    console = Console(soft_wrap=True, highlight=False)
    show_sample(console, make_sample(items[config.row]), config.max_chars)
    indices = _spread(len(items), config.sample or len(items))
    read: Iterator[Any] = map(
        items.__getitem__, track(indices, description="read", total=len(indices))
    )
    statistics = (row_statistics if is_rows else text_statistics)(read, len(items))
    show_statistics(console, statistics)
    if config.html is not None:
        shown = sorted({config.row, *_spread(len(items), config.html_samples - 1)})
        samples = [make_sample(items[index]) for index in shown]
        write_page(
            Path(config.html),
            samples,
            statistics,
            title=config.rows,
            first=shown.index(config.row),
            max_chars=config.max_chars,
        )
        console.print(f"{config.html}: {len(samples)} samples")


def _open(path: str, split: str | None) -> RowDataset | TextSet:
    """Opens rows if the first item has their columns, else texts."""
    source = open_source(path, split=split)
    is_rows = len(source) > 0 and source.columns(0).get(LONG_COLUMNS[0]) is not None
    return open_rows(path, split=split) if is_rows else TextSet(path, split=split)


def _spread(length: int, number: int) -> list[int]:
    """Returns `number` indices spread evenly over all, in order."""
    return np.linspace(0, length - 1, min(number, length)).astype(int).tolist()
