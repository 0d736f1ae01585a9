"""Sources of texts to make rows from: finds their form, and reads and checks their items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from megatron_longpo.config.names import TextFormat
from megatron_longpo.data.rows.sources import open_source
from megatron_longpo.data.text.dpo_sets import DpoPair, check_dpo_pair, describe_dpo_form
from megatron_longpo.data.text.examples import Example, check_example
from megatron_longpo.errors import UserError

NEEDED_COLUMNS: dict[TextFormat, tuple[str, ...]] = {
    "longpo": ("document", "turns"),
    "dpo": ("chosen", "rejected"),
}
"""Columns that tell the forms apart; a DPO set may also have a prompt."""


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
        self[0]
        self.description = (
            "LongPO examples: documents with turns"
            if self.format == "longpo"
            else f"a DPO set: {describe_dpo_form(first)}"
        )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example | DpoPair:
        columns, source = self._source.columns(index), self._source.where(index)
        if self.format == "longpo":
            return check_example(columns, source=source)
        return check_dpo_pair(columns, source=source, default_id=str(index))

    def __iter__(self) -> Iterator[Example | DpoPair]:
        return (self[index] for index in range(len(self)))


def find_format(columns: Mapping[str, Any], path: str) -> TextFormat:
    """Returns the form of a set by the columns of its first item."""
    present = [name for name, value in columns.items() if value is not None]
    for form, needed in NEEDED_COLUMNS.items():
        if all(name in present for name in needed):
            return form
    if "chosen_input_ids" in present:
        raise UserError(f"{path}: holds rows of token ids already; give it to train as data.path")
    raise UserError(
        f"{path}: has the columns {', '.join(present) or '(none)'}; needs document and turns (what "
        "longpo generate writes), or chosen and rejected with or without prompt (a DPO set)"
    )
