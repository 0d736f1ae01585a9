"""Conversations to token rows: answers are labelled by position, never by searching for markers.

A row is built of pieces, each tokenised by itself, so that no token straddles the border between
a prompt and an answer:

    prompt of turn 1 | answer 1 and its end of turn | rest of the prompt of turn 2 | answer 2 ...

- The prompt of a turn is the template's rendering of the messages so far with its generation
  prompt: what the model sees when it writes the answer. Chosen and rejected share it token by
  token, and `prompt_ids` gives the same ids for generation.
- Where an answer stands in a rendering is found by rendering again with one character put before
  or after it: the texts part exactly there, whatever the document holds.
- Pieces are joined append-only. A template that rewrites earlier answers (Qwen3 removes their
  thinking) keeps them here as they were when they were written.
- Special-token text inside a message is plain text: the piece is split inside it, so it is never
  read as the special token. So is the template's other markup, such as Qwen3's `<think>`.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable, Sequence

import numpy as np

from megatron_longpo.data.rows import IGNORED_LABEL, TokenRow
from megatron_longpo.data.tokenizers import ChatTokenizer, Message
from megatron_longpo.errors import UserError

_PROBES = ("x", "y")
"""Two different characters: the text that follows an answer can begin with only one of them."""

_ANCHORS = ("\n", ".", "a")
"""Texts to tokenise in front of a piece that continues a text; see `_encode_after`."""


class TemplateChangesText(UserError):
    """The chat template does not render this message's text as it is."""


def prompt_ids(
    tokenizer: ChatTokenizer, messages: Sequence[Message], *, answers_from: int = 0
) -> list[int]:
    """The ids of a conversation that ends with a user's message, ready for the answer.

    They are what `conversation_row` holds before that answer; `answers_from` is as there.
    """
    conversation = _Conversation(tokenizer, messages, answers_from)
    ids, _ = conversation.answered_turns()
    return ids + conversation.prompt_pieces(len(messages))


def conversation_row(
    tokenizer: ChatTokenizer, messages: Sequence[Message], *, answers_from: int = 0
) -> TokenRow:
    """The row of a whole conversation; the assistant's messages are answers.

    Labels cover each answer and the end-of-turn tokens right after it, and nothing else. Texts are
    stripped of outer white space, as most templates do anyway.

    Args:
        tokenizer: the model's.
        messages: the conversation, which ends with an answer.
        answers_from: index of the first message that may be an answer. The assistant's messages
            before it are part of the prompt, as the template renders them, and have no labels.
    """
    ids, labels = _Conversation(tokenizer, messages, answers_from).answered_turns()
    return TokenRow(
        input_ids=np.array(ids, dtype=np.int64), labels=np.array(labels, dtype=np.int64)
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
        special = [re.escape(text) for text in tokenizer.special_texts if len(text) > 1]
        # A lookahead, so that texts which overlap are all found.
        self._special = re.compile(f"(?=({'|'.join(special)}))") if special else None
        self._end_of_turn = re.compile(rf"\s*(?:{'|'.join(special)})+") if special else None

    def answered_turns(self) -> tuple[list[int], list[int]]:
        """Ids and labels up to the end of the last answer."""
        ids: list[int] = []
        labels: list[int] = []
        for index in self.answers:
            prompt = self.prompt_pieces(index)
            answer = self.answer_pieces(index)
            ids += prompt + answer
            labels += [IGNORED_LABEL] * len(prompt) + answer
        return ids, labels

    def prompt_pieces(self, index: int) -> list[int]:
        """Ids of the prompt for the answer `index`, from the end of the answer before it on."""
        prompt = self._prompt(index)
        previous = [i for i in self.answers if i < index]
        if not previous:
            return self._encode(prompt, cuts=self._cuts(index, range(index)), start=0, context="")
        _, end = self._locate(previous[-1], upto=index, generation_prompt=True)
        end_of_turn = self._end_of_turn_after(previous[-1])
        if not prompt.startswith(end_of_turn, end):
            raise self._refusal("ends an earlier answer unlike the last one")
        start = end + len(end_of_turn)
        cuts = self._cuts(index, range(previous[-1] + 1, index))
        return self._encode(prompt, cuts=cuts, start=start, context=end_of_turn.lstrip())

    def answer_pieces(self, index: int) -> list[int]:
        """Ids of the answer `index` with its end of turn and any space the template leads it by."""
        prompt = self._prompt(index)
        full = self._render(index + 1)
        start, end = self._locate(index, upto=index + 1)
        lead = self._lead(full[:start], prompt, index)
        cuts = [start + cut for cut in self._special_cuts(full[start:end])]
        stop = end + len(self._end_of_turn_after(index))
        context = self._special_tail(prompt)
        return self._encode(full[:stop], cuts=cuts, start=start - len(lead), context=context)

    # ------------------------------------------------------------ rendering and positions

    def _render(self, upto: int) -> str:
        return self._tokenizer.render(self._messages[:upto])

    def _prompt(self, upto: int) -> str:
        return self._tokenizer.render(self._messages[:upto], add_generation_prompt=True)

    def _end_of_turn_after(self, index: int) -> str:
        """The special tokens that the template puts right after an answer."""
        full = self._render(index + 1)
        _, end = self._locate(index, upto=index + 1)
        found = self._end_of_turn.match(full, end) if self._end_of_turn else None
        if found is None:
            raise self._refusal("puts no special token after an answer, so none would end it")
        return found.group()

    def _lead(self, before: str, prompt: str, index: int) -> str:
        """The white space between a prompt and its answer; `before` is the text before the answer.

        The two agree, but for a system prompt that a template (Mistral v0.3, Nemo) puts into the
        last message, if that is the user's, and nowhere else. The prompt then has what the model
        sees when it answers.
        """
        tail = prompt
        if index > 0 and not before.startswith(prompt):
            start, _ = self._locate(index - 1, upto=index, generation_prompt=True)
            tail = prompt[start:]
        _, found, lead = before.rpartition(tail)
        if not found:
            raise self._refusal("renders an answer with other text before it than its prompt")
        if lead.strip():
            raise self._refusal("puts text between its generation prompt and the answer")
        return lead

    def _locate(self, index: int, *, upto: int, generation_prompt: bool = False) -> tuple[int, int]:
        """Where message `index` stands in the rendering of the first `upto` messages."""
        messages = self._messages[:upto]
        content = messages[index]["content"]

        def render(changed: str) -> str:
            changed_message = {**messages[index], "content": changed}
            return self._tokenizer.render(
                [*messages[:index], changed_message, *messages[index + 1 :]],
                add_generation_prompt=generation_prompt,
            )

        text = render(content)
        start = _parting(text, render, [probe + content for probe in _PROBES])
        end = _parting(text, render, [content + probe for probe in _PROBES])
        if text[start:end] != content:
            raise TemplateChangesText(
                f"{self._tokenizer.name}: its chat template changes the text of a message "
                f"({content[:40]!r}...); set another with chat_template or drop that message"
            )
        return start, end

    def _refusal(self, problem: str) -> UserError:
        return UserError(
            f"{self._tokenizer.name}: its chat template {problem}; set another with chat_template"
        )

    # ------------------------------------------------------------ tokens

    def _special_tail(self, text: str) -> str | None:
        """The special token that a text ends with, or None.

        Some tokenizers begin anew after one, with a space (Llama 2) or without (Mistral v0.3).
        """
        texts = [special for special in self._tokenizer.special_texts if text.endswith(special)]
        return max(texts, key=len, default=None)

    def _special_cuts(self, content: str) -> list[int]:
        """Offsets one character inside each special-token text of a message."""
        if self._special is None:
            return []
        return [found.start() + 1 for found in self._special.finditer(content)]

    def _cuts(self, upto: int, indices: range) -> list[int]:
        """Offsets in the prompt where special-token text of these messages gets split."""
        cuts: list[int] = []
        for index in indices:
            inside = self._special_cuts(self._messages[index]["content"])
            if inside:
                start, _ = self._locate(index, upto=upto, generation_prompt=True)
                cuts += [start + offset for offset in inside]
        return cuts

    def _encode(self, text: str, *, cuts: list[int], start: int, context: str | None) -> list[int]:
        """Ids of `text[start:]`, split at `cuts`.

        `context` is the text that the first piece is tokenised after: "" = none, it begins the
        row; None = a text that goes on, whose exact words do not matter.
        """
        ids: list[int] = []
        borders = [start, *cuts, len(text)]
        for left, right in itertools.pairwise(borders):
            piece = text[left:right]
            if left > start or context is None:
                ids += self._encode_after(_ANCHORS, piece)
            elif context:
                ids += self._encode_after((context, *_ANCHORS), piece)
            else:
                ids += self._tokenizer.encode(piece)
        return ids

    def _encode_after(self, contexts: Sequence[str], piece: str) -> list[int]:
        """Ids of `piece` as the continuation of a text.

        Sentencepiece tokenizers put a space before whatever they are given. So the piece is
        tokenised behind a short text, whose own ids are then taken off; that is exact where they
        come out unchanged, and another text is tried where the two have merged.
        """
        if not piece:
            return []
        for context in contexts:
            before = self._tokenizer.encode(context)
            both = self._tokenizer.encode(context + piece)
            if before and both[: len(before)] == before:
                return both[len(before) :]
        raise UserError(
            f"{self._tokenizer.name}: its tokenizer merges {piece[:20]!r} with any text before it; "
            "answers cannot be told from prompts by token"
        )


def _parting(text: str, render: Callable[[str], str], changed: Sequence[str]) -> int:
    """The offset where `text` and the renderings with one character put in begin to differ."""
    return min(_common_prefix_length(text, render(content)) for content in changed)


def _common_prefix_length(left: str, right: str) -> int:
    """How many leading characters two texts share, by bisection: slices compare fast."""
    longest = min(len(left), len(right))
    if left[:longest] == right[:longest]:
        return longest
    return bisect.bisect_left(
        range(1, longest + 1), True, key=lambda length: left[:length] != right[:length]
    )
