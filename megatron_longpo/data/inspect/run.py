"""`longpo inspect`: shows rows or examples on the console and as a page for a browser."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
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
from megatron_longpo.data.progress import Dropped, track
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
    try:
        shown_item = items[config.row]
    except Dropped as reason:
        raise UserError(
            f"row ({config.row}): no row can carry it ({reason}); choose another"
        ) from None
    show_sample(console, make_sample(shown_item), config.max_chars)
    indices = _spread(len(items), config.sample or len(items))
    read = _read(items, track(indices, description="read", total=len(indices)))
    statistics = (row_statistics if is_rows else text_statistics)(
        (item for _, item in read), len(items)
    )
    show_statistics(console, statistics)
    if config.html is not None:
        picked = sorted({config.row, *_spread(len(items), config.html_samples - 1)})
        shown = dict(_read(items, picked))
        samples = [make_sample(item) for item in shown.values()]
        write_page(
            Path(config.html),
            samples,
            statistics,
            title=config.rows,
            first=list(shown).index(config.row),
            max_chars=config.max_chars,
        )
        console.print(f"{config.html}: {len(samples)} samples")


def _open(path: str, split: str | None) -> RowDataset | TextSet:
    """Opens rows if the first item has their columns, else texts."""
    source = open_source(path, split=split)
    is_rows = len(source) > 0 and source.columns(0).get(LONG_COLUMNS[0]) is not None
    return open_rows(path, split=split) if is_rows else TextSet(path, split=split)


def _read(items: RowDataset | TextSet, indices: Iterable[int]) -> Iterator[tuple[int, Any]]:
    """Yields items with their index, without those that a row cannot carry."""
    for index in indices:
        with contextlib.suppress(Dropped):
            yield index, items[index]


def _spread(length: int, number: int) -> list[int]:
    """Returns `number` indices spread evenly over all, in order."""
    return np.linspace(0, length - 1, min(number, length)).astype(int).tolist()
