"""Renders conversations by the chat template, and finds the position of each message in them.

Positions come from a second rendering with short marks in place of the messages: the text around
the marks, with the messages in place of the marks, must equal the real rendering. If it does not,
because a template depends on what a message says, the conversation is rendered again with one
character added before or after the message: the renderings begin to differ exactly there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_longpo.data.common_prefix import common_text_length
from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer, Message
from megatron_longpo.errors import UserError

_PROBES = ("x", "y")
"""Two different characters: the text after a message can begin with only one of them."""


class TemplateChangesText(UserError):
    """Raised if the chat template changes the text of a message."""


class Renderings:
    """The renderings of one conversation's beginnings."""

    def __init__(self, tokenizer: ChatTokenizer, messages: Sequence[Message]) -> None:
        self._tokenizer = tokenizer
        self._messages = messages
        self._texts: dict[tuple[int, bool], str] = {}
        self._spans: dict[tuple[int, bool], dict[int, tuple[int, int]]] = {}

    def text(self, upto: int, *, generation_prompt: bool = False) -> str:
        """Returns the rendering of the first `upto` messages."""
        key = (upto, generation_prompt)
        if key not in self._texts:
            self._texts[key] = self._tokenizer.render(
                self._messages[:upto], add_generation_prompt=generation_prompt
            )
        return self._texts[key]

    def span(self, index: int, *, upto: int, generation_prompt: bool = False) -> tuple[int, int]:
        """Returns [start, end) of message `index` in the characters of `text(upto)`.

        Raises:
            TemplateChangesText: if the rendering does not contain the message unchanged.
        """
        key = (upto, generation_prompt)
        if key not in self._spans:
            self._spans[key] = self._spans_by_marks(upto, generation_prompt)
        if index not in self._spans[key]:
            self._spans[key][index] = self._span_by_probes(index, upto, generation_prompt)
        return self._spans[key][index]

    def _spans_by_marks(self, upto: int, generation_prompt: bool) -> dict[int, tuple[int, int]]:
        """Returns the spans of all messages, or of none if the marks do not prove them."""
        roles = tuple(message["role"] for message in self._messages[:upto])
        frame = _frame(self._tokenizer, roles, generation_prompt)
        if frame is None:
            return {}
        spans: dict[int, tuple[int, int]] = {}
        parts = [frame.texts[0]]
        position = len(parts[0])
        for index, text in zip(frame.order, frame.texts[1:], strict=True):
            content = self._messages[index]["content"]
            spans[index] = (position, position + len(content))
            parts += [content, text]
            position += len(content) + len(text)
        is_proven = "".join(parts) == self.text(upto, generation_prompt=generation_prompt)
        return spans if is_proven else {}

    def _span_by_probes(self, index: int, upto: int, generation_prompt: bool) -> tuple[int, int]:
        messages = self._messages[:upto]
        content = messages[index]["content"]

        def render(changed: str) -> str:
            changed_message = {**messages[index], "content": changed}
            return self._tokenizer.render(
                [*messages[:index], changed_message, *messages[index + 1 :]],
                add_generation_prompt=generation_prompt,
            )

        text = self.text(upto, generation_prompt=generation_prompt)
        start = _parting(text, render, [probe + content for probe in _PROBES])
        end = _parting(text, render, [content + probe for probe in _PROBES])
        if text[start:end] != content:
            raise TemplateChangesText(
                f"{self._tokenizer.name}: its chat template changes the text of a message "
                f"({content[:40]!r}...); set another with chat_template or drop that message"
            )
        return start, end


@dataclass(frozen=True, kw_only=True, slots=True)
class _Frame:
    """The text of a template around messages of certain roles."""

    order: tuple[int, ...]
    """Indices of the messages in the order of the rendering."""
    texts: tuple[str, ...]
    """The text before the first message, between messages, and after the last."""


@lru_cache(maxsize=128)
def _frame(
    tokenizer: ChatTokenizer, roles: tuple[str, ...], generation_prompt: bool
) -> _Frame | None:
    """Finds the frame by rendering marks; None if a mark appears more than once."""
    marks = [f"\ue000{index}\ue001" for index in range(len(roles))]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    try:
        text = tokenizer.render(messages, add_generation_prompt=generation_prompt)
    except UserError:
        return None  # rendering the real messages raises the right error
    if any(text.count(mark) > 1 for mark in marks):
        return None
    # A template may put the system prompt into a later message, or nowhere.
    places = sorted((text.index(mark), index) for index, mark in enumerate(marks) if mark in text)
    texts: list[str] = []
    position = 0
    for start, index in places:
        texts.append(text[position:start])
        position = start + len(marks[index])
    return _Frame(order=tuple(index for _, index in places), texts=(*texts, text[position:]))


def _parting(text: str, render: Callable[[str], str], changed: Sequence[str]) -> int:
    """Returns the offset at which `text` and renderings with one more character begin to differ."""
    return min(common_text_length(text, render(content)) for content in changed)
