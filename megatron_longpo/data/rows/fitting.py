"""Fits rows to a model: checks ids against its vocabulary, and drops or cuts what is too long."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_longpo.data.common_prefix import common_prefix_length
from megatron_longpo.data.rows.schema import IGNORED_LABEL, PreferenceRow, TokenRow
from megatron_longpo.errors import UserError


def fit_row(
    row: PreferenceRow,
    *,
    vocab_size: int,
    max_length: int,
    too_long: str,
    max_reference_length: int | None = None,
) -> PreferenceRow | None:
    """Returns the row if it fits the model, cut if need be, or None if it is dropped as too long.

    `max_length` is the limit of the long rows, `max_reference_length` that of the short ones.
    `too_long` (the setting `data.too_long`) is `error`, `drop` or `truncate_document`, which cuts
    tokens from the middle of the document that chosen and rejected share. Short rows are never cut,
    since their chunk is the evidence.
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


def _truncate_document(row: PreferenceRow, max_length: int) -> PreferenceRow:
    """Cuts the middle of the shared document so that both long rows fit `max_length`.

    The first short row has the same template before its chunk and the same question after it. So
    what the long row shares with it at both ends is kept: the beginning of the template, the
    question, and the chunk itself if it is at an end of the document. Without a short row, the
    document's tokens cannot be told from the question's.
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
