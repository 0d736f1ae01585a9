"""Turns conversations into token rows. Answers are labelled by position, not by finding markers.

A row consists of pieces, each tokenised by itself, so that no token crosses the border between a
prompt and an answer:

    prompt of turn 1 | answer 1 and its end of turn | rest of the prompt of turn 2 | answer 2 ...

- The prompt of a turn is the template's rendering of the messages so far with its generation
  prompt: what the model sees when it writes the answer. Chosen and rejected share it token by
  token, and `prompt_ids` gives the same ids for generation.
- The position of an answer in a rendering is known by construction (`Renderings`), whatever the
  document contains.
- Pieces are only appended. If a template rewrites earlier answers (Qwen3 removes their thinking),
  the row keeps them as they were when they were written.
- The text of a special token inside a message is plain text: the piece is split inside it, so that
  it never becomes the special token. The same holds for other markup of the template, such as
  Qwen3's `<think>`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from megatron_longpo.data.rows.schema import IGNORED_LABEL, TokenRow
from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer, Message
from megatron_longpo.data.text.renderings import Renderings
from megatron_longpo.errors import UserError

_ANCHORS = ("\n", ".", "a")
"""Texts to tokenise before a piece that continues a text; see `_encode_after`."""


def prompt_ids(
    tokenizer: ChatTokenizer, messages: Sequence[Message], *, answers_from: int = 0
) -> list[int]:
    """Returns the ids of a conversation that ends with a user's message, ready for the answer.

    `conversation_row` has the same ids before that answer. `answers_from` is as there.
    """
    conversation = _Conversation(tokenizer, messages, answers_from)
    pieces = [*conversation.answered_turns(), (conversation.prompt_piece(len(messages)), False)]
    return _joined([ids for ids, _ in pieces]).tolist()


def conversation_row(
    tokenizer: ChatTokenizer, messages: Sequence[Message], *, answers_from: int = 0
) -> TokenRow:
    """Returns the row of a whole conversation, in which the assistant's messages are answers.

    Labels cover each answer and the end-of-turn tokens directly after it, and nothing else. White
    space at both ends of a message is removed, as most templates do.

    Args:
        tokenizer: the model's tokenizer.
        messages: the conversation, which ends with an answer.
        answers_from: index of the first message that may be an answer. Earlier messages of the
            assistant are part of the prompt, as the template renders them, without labels.
    """
    pieces = list(_Conversation(tokenizer, messages, answers_from).answered_turns())
    return TokenRow(
        input_ids=_joined([ids for ids, _ in pieces]),
        labels=_joined(
            [ids if is_answer else np.full_like(ids, IGNORED_LABEL) for ids, is_answer in pieces]
        ),
    )


class _Conversation:
    """The messages of one row and their renderings."""

    def __init__(
        self, tokenizer: ChatTokenizer, messages: Sequence[Message], answers_from: int
    ) -> None:
        self._tokenizer = tokenizer
        self._messages = [
            {"role": message["role"], "content": message["content"].strip()} for message in messages
        ]
        self.answers = [
            index
            for index, message in enumerate(self._messages)
            if message["role"] == "assistant" and index >= answers_from
        ]
        self._renderings = Renderings(tokenizer, self._messages)
        self._special, self._end_of_turn = _special_patterns(tokenizer)

    def answered_turns(self) -> Iterator[tuple[np.ndarray, bool]]:
        """Yields the ids of each prompt and answer up to the last, with whether it is an answer."""
        for index in self.answers:
            yield self.prompt_piece(index), False
            yield self.answer_piece(index), True

    def prompt_piece(self, index: int) -> np.ndarray:
        """Returns the ids of the prompt for answer `index`, from the end of the previous answer."""
        prompt = self._renderings.text(index, generation_prompt=True)
        previous = [i for i in self.answers if i < index]
        if not previous:
            return self._encode(prompt, cuts=self._cuts(index, range(index)), start=0, context="")
        _, end = self._renderings.span(previous[-1], upto=index, generation_prompt=True)
        end_of_turn = self._end_of_turn_after(previous[-1])
        if not prompt.startswith(end_of_turn, end):
            raise self._refusal("ends an earlier answer unlike the last one")
        start = end + len(end_of_turn)
        cuts = self._cuts(index, range(previous[-1] + 1, index))
        return self._encode(prompt, cuts=cuts, start=start, context=end_of_turn.lstrip())

    def answer_piece(self, index: int) -> np.ndarray:
        """Returns the ids of answer `index` with its end of turn and any space before it."""
        prompt = self._renderings.text(index, generation_prompt=True)
        full = self._renderings.text(index + 1)
        start, end = self._renderings.span(index, upto=index + 1)
        lead = self._lead(full[:start], prompt, index)
        cuts = [start + cut for cut in self._special_cuts(full[start:end])]
        stop = end + len(self._end_of_turn_after(index))
        context = self._special_tail(prompt)
        return self._encode(full[:stop], cuts=cuts, start=start - len(lead), context=context)

    # ------------------------------------------------------------ texts around answers

    def _end_of_turn_after(self, index: int) -> str:
        """Returns the special tokens that the template puts directly after an answer."""
        full = self._renderings.text(index + 1)
        _, end = self._renderings.span(index, upto=index + 1)
        found = self._end_of_turn.match(full, end) if self._end_of_turn else None
        if found is None:
            without = "" if self._tokenizer.eos_ids else " (the tokenizer has no eos_token)"
            raise self._refusal(
                f"puts no special token after an answer, so none would end it{without}"
            )
        return found.group()

    def _lead(self, before: str, prompt: str, index: int) -> str:
        """Returns the white space between a prompt and its answer.

        `before` is the text before the answer. It begins like the prompt, except for templates
        (Mistral v0.3, Nemo) that put the system prompt into the last message if that is the user's.
        Then the prompt is what the model sees when it answers.
        """
        tail = prompt
        if index > 0 and not before.startswith(prompt):
            start, _ = self._renderings.span(index - 1, upto=index, generation_prompt=True)
            tail = prompt[start:]
        _, found, lead = before.rpartition(tail)
        if not found:
            raise self._refusal("renders an answer with other text before it than its prompt")
        if lead.strip():
            raise self._refusal("puts text between its generation prompt and the answer")
        return lead

    def _refusal(self, problem: str) -> UserError:
        return UserError(
            f"{self._tokenizer.name}: its chat template {problem}; set another with chat_template"
        )

    # ------------------------------------------------------------ tokens

    def _special_tail(self, text: str) -> str | None:
        """Returns the special token that a text ends with, or None.

        After one, some tokenizers add a space (Llama 2) and others do not (Mistral v0.3).
        """
        texts = [special for special in self._tokenizer.special_texts if text.endswith(special)]
        return max(texts, key=len, default=None)

    def _special_cuts(self, content: str) -> list[int]:
        """Returns offsets one character inside each special-token text of a message."""
        cuts: list[int] = []
        # Each search begins one character after the last find, so that overlapping texts are found.
        while self._special and (found := self._special.search(content, cuts[-1] if cuts else 0)):
            cuts.append(found.start() + 1)
        return cuts

    def _cuts(self, upto: int, indices: range) -> list[int]:
        """Returns the offsets at which special-token texts of these messages are split."""
        cuts: list[int] = []
        for index in indices:
            inside = self._special_cuts(self._messages[index]["content"])
            if inside:
                start, _ = self._renderings.span(index, upto=upto, generation_prompt=True)
                cuts += [start + offset for offset in inside]
        return cuts

    def _encode(self, text: str, *, cuts: list[int], start: int, context: str | None) -> np.ndarray:
        """Returns the ids of `text[start:]`, split at `cuts`.

        `context` is the text that the first piece is tokenised after: "" = none, since the piece
        begins the row; None = any text that it continues.
        """
        ids: list[np.ndarray] = []
        borders = [start, *cuts, len(text)]
        for left, right in itertools.pairwise(borders):
            piece = text[left:right]
            if left > start or context is None:
                ids.append(self._encode_after(_ANCHORS, piece))
            elif context:
                ids.append(self._encode_after((context, *_ANCHORS), piece))
            else:
                ids.append(self._tokenizer.ids(piece))
        return _joined(ids)

    def _encode_after(self, contexts: Sequence[str], piece: str) -> np.ndarray:
        """Returns the ids of `piece` as the continuation of a text.

        Sentencepiece tokenizers put a space before every text. So the piece is tokenised after a
        short text, whose ids are then removed. This is exact if those ids are unchanged; if the two
        texts have merged, another short text is tried.
        """
        if not piece:
            return np.empty(0, dtype=np.int64)
        for context in contexts:
            before = self._tokenizer.ids(context)
            both = self._tokenizer.ids(context + piece)
            if len(before) and np.array_equal(both[: len(before)], before):
                return both[len(before) :]
        raise UserError(
            f"{self._tokenizer.name}: its tokenizer merges {piece[:20]!r} with any text before it; "
            "answers cannot be told from prompts by token"
        )


def _joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenates the pieces to [S] int64; there are none if a conversation has no answer."""
    return np.concatenate([np.empty(0, dtype=np.int64), *pieces])


@lru_cache(maxsize=8)
def _special_patterns(
    tokenizer: ChatTokenizer,
) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
    """Returns patterns for the text of a special token, and for those that end a turn."""
    texts = [re.escape(text) for text in tokenizer.special_texts if len(text) > 1]
    if not texts:
        return None, None
    any_text = "|".join(texts)
    return re.compile(any_text), re.compile(rf"\s*(?:{any_text})+")
