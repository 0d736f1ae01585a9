from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_longpo.data.rows.fitting import fit_row
from megatron_longpo.data.rows.schema import (
    IGNORED_LABEL,
    PreferenceRow,
    TokenRow,
)
from megatron_longpo.errors import UserError
from tests.data.rows.row_files import EOS

TEMPLATE_HEAD, QUESTION = [90, 91], [92, 93, 94]


def long_row(document: list[int], chunk: list[int]) -> PreferenceRow:
    def tokens(context: list[int], answer: list[int]) -> TokenRow:
        prompt = [*TEMPLATE_HEAD, *context, *QUESTION]
        ids = np.array([*prompt, *answer], dtype=np.int64)
        labels = np.array([IGNORED_LABEL] * len(prompt) + answer, dtype=np.int64)
        return TokenRow(input_ids=ids, labels=labels)

    chosen, rejected = [80, EOS], [80, 81, 82, EOS]
    return PreferenceRow(
        id="x",
        source="rows.jsonl:1",
        chosen=tokens(document, chosen),
        rejected=tokens(document, rejected),
        reference_chosen=(tokens(chunk, chosen),),
        reference_rejected=(tokens(chunk, rejected),),
    )


def fit(row: PreferenceRow, max_length: int, too_long: str, **more: Any) -> PreferenceRow | None:
    return fit_row(row, vocab_size=100, max_length=max_length, too_long=too_long, **more)


def test_row_that_fits_stays() -> None:
    row = long_row(list(range(20)), [7, 8])
    assert fit(row, 29, "error") is row


def test_truncation_takes_the_middle_of_the_document() -> None:
    row = fit(long_row(list(range(20)), [7, 8]), 17, "truncate_document")
    assert row is not None
    kept = [0, 1, 2, 3, 16, 17, 18, 19]
    assert row.chosen.input_ids.tolist() == [*TEMPLATE_HEAD, *kept, *QUESTION, 80, EOS]
    assert row.rejected.input_ids.tolist() == [*TEMPLATE_HEAD, *kept, *QUESTION, 80, 81, 82, EOS]
    assert row.chosen.labels.tolist() == [IGNORED_LABEL] * 13 + [80, EOS]
    assert len(row.rejected) == 17
    assert row.reference_chosen[0].input_ids.tolist() == [*TEMPLATE_HEAD, 7, 8, *QUESTION, 80, EOS]


def test_truncation_never_reaches_the_question() -> None:
    row = fit(long_row(list(range(20)), [7, 8]), 9, "truncate_document")
    assert row is not None
    assert row.rejected.input_ids.tolist() == [*TEMPLATE_HEAD, *QUESTION, 80, 81, 82, EOS]
    with pytest.raises(UserError, match=r"is 21 tokens longer than 8 and only 20 of its shared"):
        fit(long_row(list(range(20)), [7, 8]), 8, "truncate_document")


def test_truncation_keeps_a_chunk_at_the_end_of_the_document() -> None:
    row = fit(long_row(list(range(20)), [17, 18, 19]), 15, "truncate_document")
    assert row is not None
    assert row.chosen.input_ids[2:8].tolist() == [0, 15, 16, 17, 18, 19]


def test_truncation_without_a_short_row_is_refused() -> None:
    row = replace(long_row(list(range(20)), [7]), reference_chosen=(), reference_rejected=())
    with pytest.raises(
        UserError, match=r"rows.jsonl:1: is 12 tokens longer than 17 and has no short rows"
    ):
        fit(row, 17, "truncate_document")
    assert fit(row, 17, "drop") is None
    assert fit(row, 29, "truncate_document", max_reference_length=1) is row


def test_too_long_is_an_error_or_a_drop() -> None:
    row = long_row(list(range(20)), [7, 8])
    assert fit(row, 28, "drop") is None
    with pytest.raises(UserError, match=r"rejected_input_ids has 29 tokens, more than the 28"):
        fit(row, 28, "error")
    with pytest.raises(UserError, match=r"ref_rejected_input_ids\[0\] has 11 tokens, more than"):
        fit(row, 29, "truncate_document", max_reference_length=10)
    assert fit(row, 29, "drop", max_reference_length=10) is None
    assert fit(row, 29, "error", max_reference_length=11) is row


@pytest.mark.parametrize("bad_id", [100, -1])
def test_ids_outside_the_vocabulary_are_named(bad_id: int) -> None:
    row = long_row([1, 2, bad_id], [1])
    with pytest.raises(
        UserError, match=rf"rows.jsonl:1: chosen_input_ids\[4\] is {bad_id}, outside .* of 100"
    ):
        fit(row, 50, "error")
    row = long_row([1, 2], [1, bad_id])
    with pytest.raises(UserError, match=rf"ref_chosen_input_ids\[0\]\[3\] is {bad_id}"):
        fit(row, 50, "error")
