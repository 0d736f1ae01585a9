"""Plain preference sets: a prompt with a chosen and a rejected answer, in the forms that TRL reads.

    prompt: text      chosen: text      rejected: text
    prompt: messages  chosen: messages  rejected: messages      the answers alone
                      chosen: messages  rejected: messages      whole conversations

A text is the user's message or the assistant's answer, and goes through the chat template like any
message. Whole conversations may come with a `prompt` text that repeats their first message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_longpo.data.text.chat_tokenizer import Message
from megatron_longpo.data.text.examples import check_unicode
from megatron_longpo.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class DpoPair:
    """Two conversations with a common beginning, in which no part is known to be a document."""

    id: str
    prompt: tuple[Message, ...]
    """The common beginning. The assistant's messages in it are read, not trained on."""
    chosen: tuple[Message, ...]
    """From the first compared answer; begins and ends with a message of the assistant."""
    rejected: tuple[Message, ...]
    source: str


def check_dpo_pair(columns: Mapping[str, Any], *, source: str, default_id: str) -> DpoPair:
    """Builds a pair from an unchecked row; other columns are ignored."""
    chosen = _messages(columns.get("chosen"), "chosen", "assistant", source)
    rejected = _messages(columns.get("rejected"), "rejected", "assistant", source)
    prompt: list[Message] = []
    if columns.get("prompt") is not None:
        prompt = _messages(columns["prompt"], "prompt", "user", source)
    elif isinstance(columns["chosen"], str) or isinstance(columns["rejected"], str):
        raise UserError(
            f"{source}: has no prompt, and chosen or rejected is text; give a prompt, or whole "
            "conversations as lists of messages"
        )
    if not isinstance(columns.get("prompt"), list) and _is_whole(chosen) and _is_whole(rejected):
        length = _common_length(chosen, rejected)
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    _check_order(prompt, chosen, rejected, source)
    given_id = next((columns[key] for key in ("id", "prompt_id") if columns.get(key)), default_id)
    check_unicode(str(given_id), "id", source)
    return DpoPair(
        id=str(given_id),
        prompt=tuple(prompt),
        chosen=tuple(chosen),
        rejected=tuple(rejected),
        source=source,
    )


def describe_dpo_form(columns: Mapping[str, Any]) -> str:
    """Describes the form of a row that `check_dpo_pair` accepts."""
    if isinstance(columns["chosen"], str):
        return "prompt and answers as text"
    prompt = columns.get("prompt")
    if not isinstance(prompt, list) and _is_whole(columns["chosen"]):
        return "whole conversations as messages"
    return f"prompt as {'text' if isinstance(prompt, str) else 'messages'}, answers as messages"


def _is_whole(messages: Sequence[Mapping[str, str]]) -> bool:
    """Tells whether messages begin with the prompt, not with the answer to it."""
    return messages[0]["role"] != "assistant"


def _messages(value: Any, key: str, role: str, source: str) -> list[Message]:
    """Returns messages from a list of messages, or from a text by `role`."""
    if isinstance(value, str):
        if key == "prompt" and not value.strip():
            raise UserError(f"{source}: prompt is empty")
        check_unicode(value, key, source)
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        kind = "missing" if value is None else f"a {type(value).__name__}"
        kind = "an empty list" if value == [] else kind
        raise UserError(f"{source}: {key} is {kind}, must be text or a list of messages")
    messages = []
    for number, message in enumerate(value):
        fields = message if isinstance(message, dict) else {}
        speaker, content = fields.get("role"), fields.get("content")
        if not isinstance(speaker, str) or not isinstance(content, str):
            raise UserError(
                f'{source}: {key}[{number}] must be {{"role": text, "content": text}}; '
                "tool calls and images have no place in a row"
            )
        check_unicode(content, f"{key}[{number}]", source)
        messages.append({"role": speaker, "content": content})
    return messages


def _common_length(chosen: list[Message], rejected: list[Message]) -> int:
    """Returns how many messages two conversations share, without the last message of either."""
    length = 0
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        length += 1
    return length


def _check_order(
    prompt: list[Message], chosen: list[Message], rejected: list[Message], source: str
) -> None:
    if not any(message["role"] == "user" for message in prompt):
        raise UserError(
            f"{source}: chosen and rejected share no user message to answer; both must answer the "
            "same prompt"
        )
    if prompt[-1]["role"] == "assistant":
        raise UserError(f"{source}: prompt ends with an answer; it must end with the question")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        for place, message in (("first", messages[0]), ("last", messages[-1])):
            if message["role"] != "assistant":
                raise UserError(
                    f"{source}: {name}: the {place} message after the prompt is the "
                    f"{message['role']}'s, must be the assistant's"
                )
