"""Sources of texts to make rows from: finds their form, and reads and checks their items."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from megatron_longpo.config.names import TextFormat
from megatron_longpo.data.progress import Dropped
from megatron_longpo.data.rows.sources import open_source
from megatron_longpo.data.text.dpo_sets import DpoPair, check_dpo_pair
from megatron_longpo.data.text.examples import Example, check_example
from megatron_longpo.data.text.preference_forms import describe_form, find_form, has_form
from megatron_longpo.data.text.uncarried import drop_columns, refuse_columns
from megatron_longpo.errors import UserError


class TextSet:
    """The examples or pairs of a source by index, each checked on access."""

    def __init__(
        self, path: str, *, format: Literal["auto"] | TextFormat = "auto", split: str | None = None
    ) -> None:
        """Opens a source of texts; with `format` auto, the columns of the first item decide."""
        self._source = open_source(path, split=split)
        if len(self._source) == 0:
            raise UserError(f"{path}: holds no examples; it needs at least one")
        first = self._source.columns(0)
        self.format = find_format(first, path) if format == "auto" else format
        # Checked here, so that a wrong `format` is refused before anything is written.
        refuse_columns(first, reads_system=self._reads_system(first), source=self.where(0))
        with contextlib.suppress(Dropped):
            self[0]
        self.description = (
            "LongPO examples: documents with turns"
            if self.format == "longpo"
            else f"a DPO set: {describe_form(first)}"
        )

    def __len__(self) -> int:
        return len(self._source)

    def where(self, index: int) -> str:
        """Returns where an item is from, for messages."""
        return self._source.where(index)

    def __getitem__(self, index: int) -> Example | DpoPair:
        """Returns an item. Raises `Dropped` if it has something that a row cannot carry."""
        columns, source = self._source.columns(index), self.where(index)
        drop_columns(columns, reads_system=self._reads_system(columns))
        if self.format == "longpo":
            return check_example(columns, source=source)
        return check_dpo_pair(columns, source=source, default_id=str(index))

    def _reads_system(self, columns: Mapping[str, Any]) -> bool:
        """Tells whether the form of an item defines a column of the system prompt."""
        return self.format == "dpo" and find_form(columns) != "trl"

    def __iter__(self) -> Iterator[Example | DpoPair]:
        return (self[index] for index in range(len(self)))


def find_format(columns: Mapping[str, Any], path: str) -> TextFormat:
    """Returns the form of a set by the columns of its first item."""
    present = [name for name, value in columns.items() if value is not None]
    if {"document", "turns"} <= set(present):
        return "longpo"
    if has_form(columns):
        return "dpo"
    if "chosen_input_ids" in present:
        raise UserError(f"{path}: holds rows of token ids already; give it to train as data.path")
    raise UserError(
        f"{path}: has the columns {', '.join(present) or '(none)'}; needs document and turns (what "
        "longpo generate writes), or a DPO set's: chosen and rejected, with or without prompt or "
        "conversations, or messages with rejected_response or rejected_messages"
    )
