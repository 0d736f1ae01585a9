"""Builds prompts from a document and a question, and cuts documents to fit.

`longpo generate` and `longpo tokenize` both use it, so that a model is trained on the prompts that
its answers were written for.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

import numpy as np

from megatron_longpo.config.names import CutFrom
from megatron_longpo.data.text.chat_tokenizer import Message


def user_message(context: str, question: str) -> str:
    """Returns the user's message: a document or a chunk, an empty line, the question."""
    return f"{context.rstrip()}\n\n{question}"


def opening_messages(system: str | None, context: str, question: str) -> list[Message]:
    """Returns the conversation up to the first answer."""
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": user_message(context, question)}]


def shorten_document(
    document: str,
    *,
    count_tokens: Callable[[str], int],
    max_tokens: int,
    keep: Sequence[tuple[int, int]] = (),
    cut_from: CutFrom = "middle",
    token_starts: Callable[[str], np.ndarray | None] | None = None,
) -> str | None:
    """Returns the document, cut so that `count_tokens` is at most `max_tokens`, or None.

    `count_tokens` may count a whole conversation around the document. The spans in `keep` (the
    evidence of the questions) stay; None means that they leave too little to cut. `token_starts`
    returns the characters at which tokens begin; with it, the first cut is nearly always enough.
    Without it, tokens are assumed to be equally long, and the cut grows until it is enough.
    """
    num_tokens = count_tokens(document)
    if num_tokens <= max_tokens:
        return document
    starts = None if token_starts is None else token_starts(document)
    if starts is None:
        starts = np.linspace(0, len(document), num_tokens, endpoint=False).astype(np.int64)
    # A cut may leave parts of two tokens, which become tokens of their own.
    surplus = num_tokens - max_tokens + 2
    while True:
        num_chars = _chars_of_tokens(surplus, starts, len(document), keep, cut_from)
        if num_chars is None:
            return None
        shorter = cut_document(document, num_chars, keep=keep, cut_from=cut_from)
        assert shorter is not None
        num_tokens = count_tokens(shorter)
        if num_tokens <= max_tokens:
            return shorter
        surplus += num_tokens - max_tokens


def _chars_of_tokens(
    num_tokens: int,
    starts: np.ndarray,
    length: int,
    keep: Sequence[tuple[int, int]],
    cut_from: CutFrom,
) -> int | None:
    """Returns the least number of characters to cut so that `num_tokens` tokens go, or None."""

    def tokens_in(num_chars: int) -> int:
        spans = np.array(cut_spans(length, num_chars, keep=keep, cut_from=cut_from)).reshape(-1, 2)
        left, right = np.searchsorted(starts, spans).T
        return int((right - left).sum())

    most = sum(end - start for start, end in _gaps(length, keep))
    if tokens_in(most) < num_tokens:
        return None
    return bisect.bisect_left(range(most + 1), num_tokens, key=tokens_in)


def cut_document(
    document: str, num_chars: int, *, keep: Sequence[tuple[int, int]], cut_from: CutFrom
) -> str | None:
    """Returns the document without `num_chars` characters outside the spans in `keep`, or None.

    `middle` cuts from the middle of the widest gap between kept spans, then of the next widest.
    `tail` cuts from the end of the last gap, then of the previous one.
    """
    if sum(end - start for start, end in _gaps(len(document), keep)) < num_chars:
        return None
    parts: list[str] = []
    position = 0
    for start, end in cut_spans(len(document), num_chars, keep=keep, cut_from=cut_from):
        parts.append(document[position:start])
        position = end
    return "".join([*parts, document[position:]])


def cut_spans(
    length: int, num_chars: int, *, keep: Sequence[tuple[int, int]], cut_from: CutFrom
) -> list[tuple[int, int]]:
    """Returns the spans that `cut_document` removes from `length` characters, in order."""
    gaps = _gaps(length, keep)
    if cut_from == "middle":
        gaps.sort(key=lambda gap: gap[0] - gap[1])
    else:
        gaps.reverse()
    cuts: list[tuple[int, int]] = []
    for start, end in gaps:
        size = min(num_chars, end - start)
        at = start + (end - start - size) // 2 if cut_from == "middle" else end - size
        cuts.append((at, at + size))
        num_chars -= size
    return sorted(cuts)


def _gaps(length: int, keep: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the spans outside those in `keep`, in order."""
    gaps: list[tuple[int, int]] = []
    position = 0
    for start, end in [*sorted(keep), (length, length)]:
        if start > position:
            gaps.append((position, start))
        position = max(position, end)
    return gaps
