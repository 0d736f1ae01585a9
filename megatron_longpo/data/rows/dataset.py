"""Preference rows: the public LongPO schema, read, checked and written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_longpo.data.jsonl import write_lines
from megatron_longpo.data.rows.sources import RowSource, open_source
from megatron_longpo.errors import UserError

PARTS = ("input_ids", "attention_mask", "labels")
LONG_COLUMNS = tuple(f"{branch}_{part}" for branch in ("chosen", "rejected") for part in PARTS)
REFERENCE_COLUMNS = tuple(f"ref_{column}" for column in LONG_COLUMNS)
"""The short rows' columns: all of them or none, for only some objectives read them."""

IGNORED_LABEL = -100
"""Label of a token that no loss counts as an answer."""


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
    """Where it stands, for messages: `rows.jsonl:17` or `folder[16]`."""
    chosen: TokenRow
    rejected: TokenRow
    reference_chosen: tuple[TokenRow, ...]
    """One short row a turn: that turn's chunk, question and chosen answer."""
    reference_rejected: tuple[TokenRow, ...]

    def named_rows(self) -> Iterator[tuple[str, TokenRow]]:
        """Every row with the name of its column, `{}` standing for `input_ids` or `labels`."""
        yield "chosen_{}", self.chosen
        yield "rejected_{}", self.rejected
        for branch, rows in (
            ("ref_chosen", self.reference_chosen),
            ("ref_rejected", self.reference_rejected),
        ):
            for turn, row in enumerate(rows):
                yield f"{branch}_{{}}[{turn}]", row


class RowDataset:
    """Rows by index, each checked when it is read."""

    def __init__(self, source: RowSource, *, name: str) -> None:
        self._source = source
        self.name = name
        """The path or hub id, for messages."""
        self.fingerprint = source.fingerprint
        """A hash of the content, the same wherever the data lie."""

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> PreferenceRow:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        return check_row(
            self._source.columns(index), source=self._source.where(index), default_id=str(index)
        )

    def __iter__(self) -> Iterator[PreferenceRow]:
        return (self[index] for index in range(len(self)))


def open_rows(path: str) -> RowDataset:
    """Opens rows: a JSONL file, a `save_to_disk` folder, a Parquet file or folder, or a hub id."""
    source = open_source(path, keep=(*LONG_COLUMNS, *REFERENCE_COLUMNS, "id"))
    if source.column_names is not None:
        missing = [column for column in LONG_COLUMNS if column not in source.column_names]
        if missing:
            raise UserError(
                f"{path}: lacks the column {missing[0]}; rows need {', '.join(LONG_COLUMNS)} "
                "(longpo tokenize makes them of texts)"
            )
    dataset = RowDataset(source, name=path)
    if len(dataset) == 0:
        raise UserError(f"{path}: holds no rows; it needs at least one")
    return dataset


# ---------------------------------------------------------------- checking


def check_row(columns: Mapping[str, Any], *, source: str, default_id: str) -> PreferenceRow:
    """Builds a row from unchecked columns (lists or arrays), padding taken off."""
    row_id = columns.get("id")
    # Where some rows of an Arrow table have short rows and others not, those others have nulls.
    has_reference = any(columns.get(column) is not None for column in REFERENCE_COLUMNS)
    reference = {
        branch: _reference_rows(columns, branch, source) if has_reference else ()
        for branch in ("ref_chosen", "ref_rejected")
    }
    row = PreferenceRow(
        id=default_id if row_id is None else str(row_id),
        source=source,
        chosen=_token_row(_parts(columns, "chosen", source), "chosen_{}", source),
        rejected=_token_row(_parts(columns, "rejected", source), "rejected_{}", source),
        reference_chosen=reference["ref_chosen"],
        reference_rejected=reference["ref_rejected"],
    )
    num_chosen, num_rejected = len(row.reference_chosen), len(row.reference_rejected)
    if num_chosen != num_rejected:
        raise UserError(
            f"{source}: ref_chosen has {num_chosen} rows and ref_rejected {num_rejected}; "
            "both need one row for each turn"
        )
    return row


def _parts(columns: Mapping[str, Any], branch: str, source: str) -> list[Any]:
    """The three columns of a branch, in the order of `PARTS`."""
    parts = []
    for part in PARTS:
        value = columns.get(f"{branch}_{part}")
        if value is None:
            raise UserError(
                f"{source}: lacks {branch}_{part}; a row needs input_ids, attention_mask and "
                "labels for chosen and rejected, and for both or neither of ref_chosen and "
                "ref_rejected (longpo tokenize makes rows of texts)"
            )
        parts.append(value)
    return parts


def _reference_rows(columns: Mapping[str, Any], branch: str, source: str) -> tuple[TokenRow, ...]:
    parts = _parts(columns, branch, source)
    for part, value in zip(PARTS, parts, strict=True):
        if not hasattr(value, "__len__") or isinstance(value, str | dict):
            raise UserError(f"{source}: {branch}_{part} must be a list with one list for each turn")
    lengths = {len(value) for value in parts}
    if len(lengths) != 1 or lengths == {0}:
        counts = ", ".join(f"{len(v)} in {p}" for p, v in zip(PARTS, parts, strict=True))
        raise UserError(
            f"{source}: {branch} has a different or no number of turns ({counts}); "
            "each column needs one list for each turn"
        )
    return tuple(
        _token_row(list(turn_parts), f"{branch}_{{}}[{turn}]", source)
        for turn, turn_parts in enumerate(zip(*parts, strict=True))
    )


def _token_row(parts: list[Any], name: str, source: str) -> TokenRow:
    """Checks one row and takes its padding off. `name` has `{}` where the column's part goes."""
    ids, mask, labels = (
        _integers(value, name.format(part), source)
        for part, value in zip(PARTS, parts, strict=True)
    )
    if not len(ids) == len(mask) == len(labels):
        raise UserError(
            f"{source}: {name.format('input_ids')} has {len(ids)} tokens, its attention_mask "
            f"{len(mask)} and its labels {len(labels)}; the three must be of one length"
        )
    mask_name = name.format("attention_mask")
    if ((mask != 0) & (mask != 1)).any():
        raise UserError(f"{source}: {mask_name} must hold only 0 and 1")
    length = int(mask.sum())
    # The mask alone says what padding is: a pad id may well be the end-of-turn id.
    if not mask[:length].all():
        hole = int(np.argmin(mask[:length]))
        raise UserError(
            f"{source}: {mask_name}[{hole}] is 0 before a 1; only padding on the right is allowed"
        )
    ids, labels = ids[:length], labels[:length]
    answer = labels != IGNORED_LABEL
    wrong = np.flatnonzero(answer & (labels != ids))
    if wrong.size:
        at = int(wrong[0])
        raise UserError(
            f"{source}: {name.format('labels')}[{at}] is {labels[at]} where the token id is "
            f"{ids[at]}; a label repeats its own token (unshifted) or is {IGNORED_LABEL}"
        )
    if not answer[1:].any():
        raise UserError(
            f"{source}: {name.format('labels')} marks no answer token after the first position; "
            "a row needs at least one"
        )
    return TokenRow(input_ids=ids, labels=labels)


def _integers(value: Any, name: str, source: str) -> np.ndarray:
    """[S] int64, or `UserError` where the value is anything but a flat list of integers."""
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):  # lists of different lengths, integers beyond 64 bits
        array = np.empty((), dtype=object)
    is_empty_list = array.shape == (0,)
    if not is_empty_list and (array.ndim != 1 or array.dtype.kind not in "iub"):
        raise UserError(f"{source}: {name} must be a flat list of integers")
    return array.astype(np.int64)


# ---------------------------------------------------------------- fitting to a model


def fit_row(
    row: PreferenceRow,
    *,
    vocab_size: int,
    max_length: int,
    too_long: str,
    max_reference_length: int | None = None,
) -> PreferenceRow | None:
    """The row as a model of `vocab_size` takes it, or None where it is too long and dropped.

    `max_length` bounds the long rows, `max_reference_length` the short ones. `too_long` is `error`,
    `drop` or `truncate_document` (`data.too_long` of the settings): the last cuts tokens out of the
    middle of the document that chosen and rejected share; short rows are never cut, since their
    chunk is the evidence.
    """
    for name, tokens in row.named_rows():
        wrong = np.flatnonzero((tokens.input_ids < 0) | (tokens.input_ids >= vocab_size))
        if wrong.size:
            at = int(wrong[0])
            raise UserError(
                f"{row.source}: {name.format('input_ids')}[{at}] is {tokens.input_ids[at]}, "
                f"outside the model's vocabulary of {vocab_size}; were the rows made with "
                "another tokenizer?"
            )
    for name, tokens in row.named_rows():
        is_reference = name.startswith("ref_")
        limit = max_reference_length if is_reference else max_length
        if limit is None or len(tokens) <= limit:
            continue
        if too_long == "drop":
            return None
        if is_reference or too_long == "error":
            remedy = "set data.too_long to drop" if is_reference else "set data.too_long"
            raise UserError(
                f"{row.source}: {name.format('input_ids')} has {len(tokens)} tokens, "
                f"more than the {limit} allowed; raise the limit or {remedy}"
            )
    if max(len(row.chosen), len(row.rejected)) > max_length:
        return _truncate_document(row, max_length)
    return row


def common_prefix_length(left: np.ndarray, right: np.ndarray) -> int:
    """How many leading values two 1-D arrays share."""
    length = min(len(left), len(right))
    different = np.flatnonzero(left[:length] != right[:length])
    return int(different[0]) if different.size else length


def _truncate_document(row: PreferenceRow, max_length: int) -> PreferenceRow:
    """Cuts the middle of the shared document so that both long rows fit `max_length`.

    The first short row has the same template before its chunk and the same question after it, so
    what the long row shares with it at both ends is kept: the template's head, the question, and
    the chunk itself where that stands at an end of the document. Without a short row nothing tells
    the document's tokens from the question's.
    """
    num_cut = max(len(row.chosen), len(row.rejected)) - max_length
    if not row.reference_chosen:
        raise UserError(
            f"{row.source}: is {num_cut} tokens longer than {max_length} and has no short rows "
            "(ref_chosen_input_ids) to tell its question from its document by; raise "
            "data.max_length, set data.too_long to drop, or give longpo tokenize that max_length"
        )
    long_prompt = row.chosen.input_ids[: _first_answer(row.chosen)]
    short_prompt = row.reference_chosen[0].input_ids[: _first_answer(row.reference_chosen[0])]
    shared = min(
        common_prefix_length(row.chosen.input_ids, row.rejected.input_ids),
        len(long_prompt),
        _first_answer(row.rejected),
    )
    head = common_prefix_length(long_prompt, short_prompt)
    tail = common_prefix_length(long_prompt[::-1], short_prompt[::-1])
    end = min(shared, len(long_prompt) - tail)
    if end - head < num_cut:
        raise UserError(
            f"{row.source}: is {num_cut} tokens longer than {max_length} and only "
            f"{max(0, end - head)} of its shared document can be cut without its question; "
            "raise data.max_length or set data.too_long to drop"
        )
    start = head + (end - head - num_cut) // 2
    kept = [slice(0, start), slice(start + num_cut, None)]

    def cut(tokens: TokenRow) -> TokenRow:
        return TokenRow(
            input_ids=np.concatenate([tokens.input_ids[part] for part in kept]),
            labels=np.concatenate([tokens.labels[part] for part in kept]),
        )

    return replace(row, chosen=cut(row.chosen), rejected=cut(row.rejected))


def _first_answer(tokens: TokenRow) -> int:
    return int(np.argmax(tokens.labels != IGNORED_LABEL))


# ---------------------------------------------------------------- writing


def row_columns(row: PreferenceRow) -> dict[str, Any]:
    """The row in the public schema, as plain lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(turn) for turn in value]
        return value.tolist() if isinstance(value, np.ndarray) else value

    return {name: plain(value) for name, value in row_arrays(row).items()}


def row_arrays(row: PreferenceRow) -> dict[str, Any]:
    """The row in the public schema, as arrays; short rows stay ragged, or have no columns."""
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


def row_line(row: PreferenceRow) -> bytes:
    """The row as one line of JSONL, with its line end."""
    return orjson.dumps(
        row_arrays(row), option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    )


def write_rows_jsonl(path: str | Path, rows: Iterable[PreferenceRow]) -> int:
    """Writes rows to a JSONL file (first beside it, then renamed). Returns their number."""
    return write_lines(path, (row_line(row) for row in rows))
