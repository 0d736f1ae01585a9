"""The public LongPO schema: the names of its columns, and a row as data classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

PARTS = ("input_ids", "attention_mask", "labels")
LONG_COLUMNS = tuple(f"{branch}_{part}" for branch in ("chosen", "rejected") for part in PARTS)
REFERENCE_COLUMNS = tuple(f"ref_{column}" for column in LONG_COLUMNS)
"""Columns of the short rows. A row has all of them or none: only some objectives read them."""

IGNORED_LABEL = -100
"""Label of a token that is not part of an answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRow:
    """One tokenised conversation, without padding.

    `labels` are aligned with `input_ids`: position t is an answer token where
    `labels[t] == input_ids[t]`, else `IGNORED_LABEL`. The shift is the model's: position t - 1
    predicts token t.
    """

    input_ids: np.ndarray
    """[S] int64."""
    labels: np.ndarray
    """[S] int64."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceRow:
    """One pair: two long conversations for the policy, and short ones for the reference.

    Sets for objectives without a short reference, such as plain DPO sets, have no short rows:
    both tuples are then empty.
    """

    id: str
    source: str
    """Where the row is stored, for messages: `rows.jsonl:17` or `folder[16]`."""
    chosen: TokenRow
    rejected: TokenRow
    reference_chosen: tuple[TokenRow, ...]
    """One short row for each turn: its chunk, question and chosen answer."""
    reference_rejected: tuple[TokenRow, ...]

    def named_rows(self) -> Iterator[tuple[str, TokenRow]]:
        """Yields every row with the name of its column; `{}` stands for `input_ids` or `labels`."""
        yield "chosen_{}", self.chosen
        yield "rejected_{}", self.rejected
        for branch, rows in (
            ("ref_chosen", self.reference_chosen),
            ("ref_rejected", self.reference_rejected),
        ):
            for turn, row in enumerate(rows):
                yield f"{branch}_{{}}[{turn}]", row


def row_columns(row: PreferenceRow) -> dict[str, Any]:
    """Returns the row in the public schema, as plain lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(turn) for turn in value]
        return value.tolist() if isinstance(value, np.ndarray) else value

    return {name: plain(value) for name, value in row_arrays(row).items()}


def row_arrays(row: PreferenceRow) -> dict[str, Any]:
    """Returns the row as arrays of the public schema; short rows may be absent."""
    columns: dict[str, Any] = {"id": row.id}
    for branch, tokens in (("chosen", row.chosen), ("rejected", row.rejected)):
        columns[f"{branch}_input_ids"] = tokens.input_ids
        columns[f"{branch}_attention_mask"] = np.ones_like(tokens.input_ids)
        columns[f"{branch}_labels"] = tokens.labels
    for branch, rows in (
        ("ref_chosen", row.reference_chosen),
        ("ref_rejected", row.reference_rejected),
    ):
        if not rows:
            continue
        columns[f"{branch}_input_ids"] = [tokens.input_ids for tokens in rows]
        columns[f"{branch}_attention_mask"] = [np.ones_like(tokens.input_ids) for tokens in rows]
        columns[f"{branch}_labels"] = [tokens.labels for tokens in rows]
    return columns
