"""Chat rows around a text that is put in later, as tokens.

A long text is tokenised once and cut to length by tokens. What stands around it, in the model's
chat format, is tokenised with a word in its place, and found where two such rows part.
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
"""Two words that differ in their first and in their last letter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """A row before and after its text. Letters: S tokens of the tail."""

    head: np.ndarray
    """Ids before the text, int32."""
    tail: np.ndarray
    """[S] int32: ids after it, with question and answer."""
    answer_start: int
    """Where in the tail the answer begins: what is before it is the prompt."""
    value: slice
    """Where in the tail the answer's value is: the tokens that another value would change."""
    end: int
    """Where in the tail the token is that ends the answer's turn."""

    def __len__(self) -> int:
        return len(self.head) + len(self.tail)


def make_frame(tokenizer: ChatTokenizer, question: str, answer: str, other_answer: str) -> Frame:
    """The frame of a question about a text; `other_answer` has another value in the same words.

    The two values must differ in their first and in their last letter.
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
    """Ids of a document's text, in which a special token's text is text and no special token."""
    special = [re.escape(word) for word in tokenizer.special_texts if len(word) > 1]
    cuts = []
    if special:
        # A lookahead, so that texts which overlap are all found.
        cuts = [found.start() + 1 for found in re.finditer(f"(?=({'|'.join(special)}))", text)]
    ids: list[int] = []
    for left, right in itertools.pairwise([0, *cuts, len(text)]):
        ids += tokenizer.encode(text[left:right])
    return ids


def _end_of_answer(tokenizer: ChatTokenizer, ids: np.ndarray) -> int:
    """Index of the first of the special tokens that a row ends with: templates have one or more."""
    special = {tokenizer.encode(text)[0] for text in tokenizer.special_texts}
    end = len(ids) - 1
    while int(ids[end - 1]) in special:
        end -= 1
    return end


def _common_suffix_length(one: np.ndarray, other: np.ndarray) -> int:
    return common_prefix_length(one[::-1], other[::-1])
