from __future__ import annotations

import pytest

from megatron_longpo.data.prompt_layout import (
    CutFrom,
    cut_document,
    opening_messages,
    shorten_document,
)

TEXT = "0123456789abcdefghij"


def test_prompt_is_context_then_question() -> None:
    assert opening_messages(None, "Chunk.", "What?") == [
        {"role": "user", "content": "Chunk.\n\nWhat?"}
    ]
    assert opening_messages("Be brief.", "Chunk.", "What?")[0] == {
        "role": "system",
        "content": "Be brief.",
    }


@pytest.mark.parametrize(
    ("num_chars", "keep", "cut_from", "expected"),
    [
        (10, [], "middle", "01234fghij"),
        (10, [], "tail", "0123456789"),
        (14, [(8, 12)], "middle", "89abcj"),
        (15, [(15, 18)], "tail", "01fgh"),
        (11, [(0, 2), (4, 10), (3, 5)], "middle", "013456789"),
        (0, [(0, 2)], "middle", TEXT),
    ],
)
def test_cut_keeps_the_evidence(
    num_chars: int, keep: list[tuple[int, int]], cut_from: CutFrom, expected: str
) -> None:
    assert cut_document(TEXT, num_chars, keep=keep, cut_from=cut_from) == expected


def test_nothing_left_to_cut() -> None:
    assert cut_document(TEXT, 11, keep=[(0, 10)], cut_from="tail") is None
    assert (
        shorten_document(TEXT, count_tokens=len, max_tokens=9, keep=[(0, 10)], cut_from="tail")
        is None
    )


@pytest.mark.parametrize("tokens_per_char", [0.2, 1, 3])
def test_shortened_document_fits_and_is_not_cut_far_beyond(tokens_per_char: float) -> None:
    document = TEXT * 100

    def count(text: str) -> int:
        return 50 + int(len(text) * tokens_per_char)

    shorter = shorten_document(document, count_tokens=count, max_tokens=150)
    assert shorter is not None
    assert 120 <= count(shorter) <= 150
    assert shorten_document(document, count_tokens=count, max_tokens=count(document)) == document
