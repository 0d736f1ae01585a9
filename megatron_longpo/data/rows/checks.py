"""Checks of one row: its columns become a `PreferenceRow`, or a `UserError` names the fault."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_longpo.data.rows.schema import (
    IGNORED_LABEL,
    PARTS,
    REFERENCE_COLUMNS,
    PreferenceRow,
    TokenRow,
)
from megatron_longpo.errors import UserError


def check_row(columns: Mapping[str, Any], *, source: str, default_id: str) -> PreferenceRow:
    """Builds a row from unchecked columns (lists or arrays) and removes its padding."""
    row_id = columns.get("id")
    # In an Arrow table where only some rows have short rows, the others have nulls.
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
    """Returns the three columns of a branch, in the order of `PARTS`."""
    parts = []
    for part in PARTS:
        value = columns.get(f"{branch}_{part}")
        if value is None:
            raise UserError(
                f"{source}: lacks {branch}_{part}; a row needs input_ids, attention_mask and "
                "labels for chosen and rejected, and for both or neither of ref_chosen and "
                "ref_rejected (longpo tokenize makes rows from texts)"
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
    """Checks one row and removes its padding. `name` has `{}` in place of the column's part."""
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
    # Only the mask marks padding: the pad id may be the end-of-turn id.
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
    """Returns [S] int64; raises `UserError` if the value is not a flat list of integers."""
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):  # lists of different lengths, integers beyond 64 bits
        array = np.empty((), dtype=object)
    is_empty_list = array.shape == (0,)
    if not is_empty_list and (array.ndim != 1 or array.dtype.kind not in "iub"):
        raise UserError(f"{source}: {name} must be a flat list of integers")
    return array.astype(np.int64)
