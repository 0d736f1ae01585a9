"""Frames: the tokens of a chat row before and after a text that is inserted later.

A long text is tokenised once and cut to length by tokens. The tokens around it, in the model's chat
format, come from two rows with different words in place of the text: where the rows differ, the
frame ends.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import numpy as np

from megatron_longpo.data.common_prefix import common_prefix_length
from megatron_longpo.data.rows.schema import IGNORED_LABEL
from megatron_longpo.data.text.chat import conversation_row
from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer
from megatron_longpo.data.text.prompt_layout import opening_messages

_CONTEXTS = ("one", "two")
"""Two words whose first letters differ, and whose last letters differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """The tokens of a row before and after its text. Letters: S tokens of the tail."""

    head: np.ndarray
    """Ids before the text, int32."""
    tail: np.ndarray
    """[S] int32: ids after the text, with question and answer."""
    answer_start: int
    """Index in the tail of the answer's first token; the prompt ends before it."""
    value: slice
    """Tokens of the tail that hold the answer's value: those that another value would change."""
    end: int
    """Index in the tail of the token that ends the answer's turn."""

    def __len__(self) -> int:
        return len(self.head) + len(self.tail)


def make_frame(tokenizer: ChatTokenizer, question: str, answer: str, other_answer: str) -> Frame:
    """Returns the frame of a question about a text.

    `other_answer` has the words of `answer` with another value, which must differ in its first and
    in its last letter.
    """
    row, other_context, other_value = (
        conversation_row(
            tokenizer,
            [*opening_messages(None, context, question), {"role": "assistant", "content": text}],
        )
        for context, text in (
            (_CONTEXTS[0], answer),
            (_CONTEXTS[1], answer),
            (_CONTEXTS[0], other_answer),
        )
    )
    ids = row.input_ids
    head_length = common_prefix_length(ids, other_context.input_ids)
    tail_start = len(ids) - _common_suffix_length(ids, other_context.input_ids)
    start = common_prefix_length(ids, other_value.input_ids)
    stop = len(ids) - _common_suffix_length(ids, other_value.input_ids)
    answer_start = int(np.flatnonzero(row.labels != IGNORED_LABEL)[0])
    end = _end_of_answer(tokenizer, ids)
    assert head_length <= tail_start <= answer_start <= start < stop <= end, "two places for texts"
    return Frame(
        head=ids[:head_length].astype(np.int32),
        tail=ids[tail_start:].astype(np.int32),
        answer_start=answer_start - tail_start,
        value=slice(start - tail_start, stop - tail_start),
        end=end - tail_start,
    )


def plain_ids(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """Returns the ids of a document's text, in which no text becomes a special token."""
    special = [re.escape(word) for word in tokenizer.special_texts if len(word) > 1]
    cuts = []
    if special:
        # A lookahead, so that overlapping texts are all found.
        cuts = [found.start() + 1 for found in re.finditer(f"(?=({'|'.join(special)}))", text)]
    ids: list[int] = []
    for left, right in itertools.pairwise([0, *cuts, len(text)]):
        ids += tokenizer.encode(text[left:right])
    return ids


def _end_of_answer(tokenizer: ChatTokenizer, ids: np.ndarray) -> int:
    """Returns the index of the first of the one or more special tokens that end a row."""
    special = {tokenizer.encode(text)[0] for text in tokenizer.special_texts}
    end = len(ids) - 1
    while int(ids[end - 1]) in special:
        end -= 1
    return end


def _common_suffix_length(one: np.ndarray, other: np.ndarray) -> int:
    return common_prefix_length(one[::-1], other[::-1])
