"""The places of a document's tokens in its text, found once; counting then needs no tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_PIECE = 1 << 20
"""Characters tokenised in one call: a list of all offsets of a huge text would fill the memory."""

_PIECE_BORDER = re.compile(r"(?<=\S)(?=\s\S)|(?<=\n)(?=\S)")
"""Where a text may be cut and still give the same tokens: never within white space."""

SpansOf = Callable[[str], np.ndarray]
"""Characters [start, end) of each token of a text, integers of shape [num_tokens, 2]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSpans:
    """The tokens of a text; `starts` and `ends` never fall.

    A character may belong to several tokens (its bytes), and a few may belong to none.
    """

    starts: np.ndarray
    """[num_tokens], characters."""
    ends: np.ndarray
    """[num_tokens], characters."""

    def __len__(self) -> int:
        return len(self.starts)

    def tokens_of(self, start: int, end: int) -> tuple[int, int]:
        """Returns the tokens [first, last) that any of the characters [start, end) belong to."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        return first, max(first, int(np.searchsorted(self.starts, end, side="left")))

    def count(self, start: int, end: int) -> int:
        """Returns how many tokens the characters [start, end) belong to."""
        first, last = self.tokens_of(start, end)
        return last - first

    def first(self, num_tokens: int) -> TokenSpans:
        """Returns the first tokens alone."""
        return TokenSpans(starts=self.starts[:num_tokens], ends=self.ends[:num_tokens])


def find_token_spans(text: str, spans_of: SpansOf, *, at_most: int | None = None) -> TokenSpans:
    """Tokenises a text once, in pieces of about a million characters.

    Args:
        text: any text.
        spans_of: `ChatTokenizer.spans`.
        at_most: tokens after which no further piece is read.
    """
    parts: list[np.ndarray] = []
    total = position = 0
    while position < len(text) and (at_most is None or total <= at_most):
        end = _piece_end(text, position)
        spans = spans_of(text[position:end]).reshape(-1, 2) + position
        parts.append(spans)
        total += len(spans)
        position = end
    spans = np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.int64)
    return TokenSpans(
        starts=np.maximum.accumulate(spans[:, 0]),
        ends=np.maximum.accumulate(spans[:, 1]),
    )


def _piece_end(text: str, start: int) -> int:
    end = start + _PIECE
    if end >= len(text):
        return len(text)
    found = _PIECE_BORDER.search(text, end, end + _PIECE // 16)
    return end if found is None else found.start()
