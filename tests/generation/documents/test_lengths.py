from __future__ import annotations

import re

import numpy as np
import pytest

from megatron_longpo.data.progress import Dropped
from megatron_longpo.generation.documents import token_spans
from megatron_longpo.generation.documents.lengths import LengthBounds, fit_document


class Words:
    """Words are tokens; counts the characters it was given."""

    def __init__(self) -> None:
        self.num_chars = 0

    def __call__(self, text: str) -> np.ndarray:
        self.num_chars += len(text)
        spans = [found.span() for found in re.finditer(r"\S+", text)]
        return np.array(spans, dtype=np.int64).reshape(-1, 2)


@pytest.mark.parametrize("length", [4, 5, 6])
def test_bounds_are_exact(length: int) -> None:
    text = "word " * length
    for too_long in ("cut", "drop"):
        bounds = LengthBounds(min_tokens=5, max_tokens=5, too_long=too_long)  # type: ignore[arg-type]
        if length < 5 or (length > 5 and too_long == "drop"):
            reason = "under min" if length < 5 else "over max"
            with pytest.raises(Dropped, match=f"document {reason}_document_tokens"):
                fit_document(text, Words(), bounds)
        else:
            fitted, tokens = fit_document(text, Words(), bounds)
            assert fitted == "word " * 5
            assert len(tokens) == 5


def test_no_more_is_tokenised_than_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_spans, "_PIECE", 10_000)
    words = Words()
    text, tokens = fit_document("word " * 100_000, words, LengthBounds(max_tokens=3000))
    assert (len(tokens), len(text)) == (3000, 15_000)
    assert words.num_chars < 22_000
    words = Words()
    with pytest.raises(Dropped):
        fit_document("word", words, LengthBounds(min_tokens=5))
    assert words.num_chars == 0
