from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longpo.config.names import CutFrom
from megatron_longpo.data.text.prompt_layout import (
    cut_document,
    cut_spans,
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


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    words=st.lists(
        st.sampled_from(["a", "bb", "cccc", "dddddddd", "\n\n"]), min_size=4, max_size=80
    ),
    bounds=st.lists(st.integers(0, 300), min_size=0, max_size=6),
    share=st.floats(0, 1),
    cut_from=st.sampled_from(["middle", "tail"]),
    tells_starts=st.booleans(),
)
def test_what_is_kept_stays_and_no_more_is_cut_than_needed(
    words: list[str], bounds: list[int], share: float, cut_from: CutFrom, tells_starts: bool
) -> None:
    """Tokens are words here, of very different lengths; what a cut leaves of one is one too."""
    document = " ".join(words)
    ends = sorted(min(bound, len(document)) for bound in bounds)
    keep = [(start, end) for start, end in zip(ends[::2], ends[1::2], strict=False) if start < end]

    def count(text: str) -> int:
        return len(text.split(" "))

    def starts(text: str) -> np.ndarray:
        return np.array([0] + [index + 1 for index, char in enumerate(text) if char == " "])

    max_tokens = max(1, int(share * len(words)))
    counted: list[str] = []
    shorter = shorten_document(
        document,
        count_tokens=lambda text: counted.append(text) or count(text),
        max_tokens=max_tokens,
        keep=keep,
        cut_from=cut_from,
        token_starts=starts if tells_starts else None,
    )
    if shorter is None:
        kept = sum(count(document[start:end]) for start, end in keep)
        assert kept > max_tokens - 4 - 2 * len(keep)
        return
    assert counted[-1] == shorter and count(shorter) <= max_tokens
    assert all(document[start:end] in shorter for start, end in keep)
    if shorter != document:
        spans = cut_spans(len(document), len(document) - len(shorter), keep=keep, cut_from=cut_from)
        assert all(end <= left or start >= right for start, end in spans for left, right in keep)
        if tells_starts:
            assert len(counted) <= 3 + len(spans)
            assert count(shorter) >= max_tokens - 3 - 2 * len(spans)
