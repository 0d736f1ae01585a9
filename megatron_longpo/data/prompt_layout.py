"""How a document and a question make a prompt, and how a document is cut to fit one.

`generation` and `tokenize` both come here, so that a model is trained on the prompts that its
answers were written for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from megatron_longpo.data.tokenizers import Message

CutFrom = Literal["middle", "tail"]


def user_message(context: str, question: str) -> str:
    """The user's message: a document or a chunk, an empty line, the question."""
    return f"{context.rstrip()}\n\n{question}"


def opening_messages(system: str | None, context: str, question: str) -> list[Message]:
    """The conversation up to the first answer."""
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": user_message(context, question)}]


def shorten_document(
    document: str,
    *,
    count_tokens: Callable[[str], int],
    max_tokens: int,
    keep: Sequence[tuple[int, int]] = (),
    cut_from: CutFrom = "middle",
) -> str | None:
    """The document without as many characters as it takes for `count_tokens` to give `max_tokens`.

    `count_tokens` may count a whole conversation around the document. The spans in `keep` (the
    evidence of the questions) stay; None where they leave too little to cut.
    """
    shorter: str | None = document
    num_chars = 0
    while shorter is not None and (num_tokens := count_tokens(shorter)) > max_tokens:
        chars_per_token = len(shorter) / num_tokens
        num_chars += math.ceil((num_tokens - max_tokens) * chars_per_token)
        shorter = cut_document(document, num_chars, keep=keep, cut_from=cut_from)
    return shorter


def cut_document(
    document: str, num_chars: int, *, keep: Sequence[tuple[int, int]], cut_from: CutFrom
) -> str | None:
    """The document less `num_chars` characters outside the spans in `keep`, or None.

    `middle` cuts from the middle of the widest gap between kept spans, then of the next widest;
    `tail` from the end of the last gap, then of the one before.
    """
    gaps: list[tuple[int, int]] = []
    position = 0
    for start, end in [*sorted(keep), (len(document), len(document))]:
        if start > position:
            gaps.append((position, start))
        position = max(position, end)
    if sum(end - start for start, end in gaps) < num_chars:
        return None
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
    parts: list[str] = []
    position = 0
    for start, end in sorted(cuts):
        parts.append(document[position:start])
        position = end
    return "".join([*parts, document[position:]])
