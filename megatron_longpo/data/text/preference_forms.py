"""Reads the forms in which people write preference sets: those of TRL, ms-swift and LLaMA-Factory.

    TRL            prompt: text      chosen: text      rejected: text
                   prompt: messages  chosen: messages  rejected: messages    the answers alone
                                     chosen: messages  rejected: messages    whole conversations
    ms-swift       messages: the chosen conversation   rejected_response: text or messages
                   messages: the chosen conversation   rejected_messages: the whole other one
    LLaMA-Factory  conversations: up to the question   chosen: message   rejected: message

A text is the user's message or the assistant's answer, and goes through the chat template like any
message. Whole conversations of TRL may come with a `prompt` text that repeats their first message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_longpo.data.progress import Dropped
from megatron_longpo.data.text.chat_tokenizer import Message
from megatron_longpo.data.text.examples import check_unicode
from megatron_longpo.data.text.uncarried import drop_message
from megatron_longpo.errors import UserError

FormName = Literal["trl", "ms-swift", "llama-factory"]

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
"""Names of the conversation's column in ms-swift and LLaMA-Factory."""

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
"""Roles of ShareGPT and what they are called here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sides:
    """The messages of one pair."""

    prompt: list[Message] | None
    """None if chosen and rejected are whole conversations, which begin with the prompt."""
    chosen: list[Message]
    rejected: list[Message]
    names: tuple[str, str] = ("chosen", "rejected")
    """The columns that chosen and rejected are from, for messages."""


def find_form(columns: Mapping[str, Any]) -> FormName:
    """Returns the form of a row; TRL's if it has the columns of none."""
    has = {name for name in columns if columns[name] is not None}
    if isinstance(columns.get("chosen"), dict) or isinstance(columns.get("rejected"), dict):
        return "llama-factory"
    rejected = {"rejected_response", "rejected_messages"}
    if rejected & columns.keys() and not {"chosen", "rejected"} <= has:
        return "ms-swift"
    return "trl"


def has_form(columns: Mapping[str, Any]) -> bool:
    """Tells whether a row has the columns of a form."""
    has = {name for name in columns if columns[name] is not None}
    if {"chosen", "rejected"} <= has:
        return True
    return bool(
        has & set(CONVERSATION_COLUMNS) and has & {"rejected_response", "rejected_messages"}
    )


def describe_form(columns: Mapping[str, Any]) -> str:
    """Describes the form of a row for people."""
    form = find_form(columns)
    if form == "ms-swift":
        given = columns.get("rejected_messages") is not None
        name = "rejected_messages" if given else "rejected_response"
        return f"{conversation_column(columns)} with {name}, as for ms-swift"
    if form == "llama-factory":
        return f"{conversation_column(columns)} with chosen and rejected, as for LLaMA-Factory"
    if isinstance(columns["chosen"], str):
        return "prompt and answers as text"
    prompt = columns.get("prompt")
    first = columns["chosen"][0]
    role = first.get("role") or first.get("from")
    if not isinstance(prompt, list) and ROLES.get(role, role) != "assistant":
        return "whole conversations as messages"
    return f"prompt as {'text' if isinstance(prompt, str) else 'messages'}, answers as messages"


def conversation_column(columns: Mapping[str, Any]) -> str:
    """Returns the name of the column that holds the conversation."""
    names = (name for name in CONVERSATION_COLUMNS if columns.get(name) is not None)
    return next(names, CONVERSATION_COLUMNS[0])


def read_sides(columns: Mapping[str, Any], source: str) -> Sides:
    """Returns the messages of an unchecked row.

    Raises:
        UserError: if the row does not have its form.
        Dropped: if a message has something that a row of token ids cannot carry.
    """
    form = find_form(columns)
    if form == "ms-swift":
        return _swift_sides(columns, source)
    if form == "llama-factory":
        return _factory_sides(columns, source)
    prompt = None
    chosen = messages_of(columns.get("chosen"), "chosen", "assistant", source)
    rejected = messages_of(columns.get("rejected"), "rejected", "assistant", source)
    if columns.get("prompt") is not None:
        prompt = messages_of(columns["prompt"], "prompt", "user", source)
    elif isinstance(columns["chosen"], str) or isinstance(columns["rejected"], str):
        raise UserError(
            f"{source}: has no prompt, and chosen or rejected is text; give a prompt, or whole "
            "conversations as lists of messages"
        )
    are_whole = chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant"
    if are_whole and not isinstance(columns.get("prompt"), list):
        prompt = None
    elif prompt is None:
        prompt = []
    return Sides(prompt=prompt, chosen=chosen, rejected=rejected)


def _swift_sides(columns: Mapping[str, Any], source: str) -> Sides:
    """Returns the sides of ms-swift, whose rejected response replaces all after the question."""
    key = conversation_column(columns)
    messages = _conversation(columns.get(key), key, columns, source)
    if columns.get("rejected_messages") is not None:
        name = "rejected_messages"
        rejected = _conversation(columns[name], name, columns, source)
        return Sides(prompt=None, chosen=messages, rejected=rejected, names=(key, name))
    name = "rejected_response"
    rejected = messages_of(columns.get(name), name, "assistant", source)
    questions = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if not questions:
        raise UserError(f"{source}: {key} has no user message to answer")
    prompt, chosen = messages[: questions[-1] + 1], messages[questions[-1] + 1 :]
    if not chosen:
        raise UserError(f"{source}: {key} ends with the question; it must end with an answer")
    return Sides(prompt=prompt, chosen=chosen, rejected=rejected, names=(key, name))


def _factory_sides(columns: Mapping[str, Any], source: str) -> Sides:
    """Returns the sides of LLaMA-Factory: chosen and rejected are one message each."""
    key = conversation_column(columns)
    chosen, rejected = (
        messages_of([value] if isinstance(value, dict) else value, name, "assistant", source)
        for name, value in (
            ("chosen", columns.get("chosen")),
            ("rejected", columns.get("rejected")),
        )
    )
    prompt = _conversation(columns.get(key), key, columns, source)
    return Sides(prompt=prompt, chosen=chosen, rejected=rejected)


def _conversation(value: Any, key: str, columns: Mapping[str, Any], source: str) -> list[Message]:
    """Returns the messages of a conversation, after those of a system column if it has none."""
    if isinstance(value, str):
        raise UserError(f"{source}: {key} is text, must be a list of messages")
    messages = messages_of(value, key, "user", source)
    for name in ("system", "system_prompt"):
        text = columns.get(name)
        if text and messages[0]["role"] != "system":
            if not isinstance(text, str):
                raise UserError(f"{source}: {name} is a {type(text).__name__}, must be text")
            check_unicode(text, name, source)
            return [{"role": "system", "content": text}, *messages]
    return messages


def messages_of(value: Any, key: str, role: str, source: str) -> list[Message]:
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
    return [_message(item, f"{key}[{number}]", source) for number, item in enumerate(value)]


def _message(value: Any, key: str, source: str) -> Message:
    fields = value if isinstance(value, dict) else {}
    role, content = fields.get("role"), fields.get("content")
    if role is None and fields.get("from") is not None:
        role, content = fields["from"], fields.get("value")
        role = ROLES.get(role, role) if isinstance(role, str) else role
    drop_message(fields, role)
    if isinstance(content, list):
        content = _joined_text(content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(
            f'{source}: {key} must be {{"role": text, "content": text}} or '
            '{"from": text, "value": text}'
        )
    check_unicode(content, key, source)
    return {"role": role, "content": content}


def _joined_text(parts: list[Any]) -> str | None:
    """Returns the text of a message that is given in parts; None if they have no known form."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            return None
        if kind != "text":
            raise Dropped(f"{kind} in a message")
        texts.append(part.get("text"))
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None
