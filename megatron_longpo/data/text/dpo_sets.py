"""Plain preference sets: a prompt with a chosen and a rejected answer.

text/preference_forms.py reads the forms in which they are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_longpo.data.text.chat_tokenizer import Message
from megatron_longpo.data.text.examples import check_unicode
from megatron_longpo.data.text.preference_forms import Sides, read_sides
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
    """Builds a pair from an unchecked row; other columns are ignored.

    Raises:
        UserError: if the row has no form that is known, or no two answers to one prompt.
        Dropped: if a message has something that a row of token ids cannot carry.
    """
    sides = read_sides(columns, source)
    prompt, chosen, rejected = sides.prompt, sides.chosen, sides.rejected
    if prompt is None:
        length = _common_length(chosen, rejected)
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    _check_order(prompt, chosen, rejected, sides, source)
    given_id = next((columns[key] for key in ("id", "prompt_id") if columns.get(key)), default_id)
    check_unicode(str(given_id), "id", source)
    return DpoPair(
        id=str(given_id),
        prompt=tuple(prompt),
        chosen=tuple(chosen),
        rejected=tuple(rejected),
        source=source,
    )


def _common_length(chosen: list[Message], rejected: list[Message]) -> int:
    """Returns how many messages two conversations share, without the last message of either.

    White space at both ends of a message does not count, since rows do not keep it.
    """
    length = 0
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one["role"] != other["role"] or one["content"].strip() != other["content"].strip():
            break
        length += 1
    return length


def _check_order(
    prompt: list[Message],
    chosen: list[Message],
    rejected: list[Message],
    sides: Sides,
    source: str,
) -> None:
    chosen_name, rejected_name = sides.names
    if not any(message["role"] == "user" for message in prompt):
        raise UserError(
            f"{source}: {chosen_name} and {rejected_name} share no user message to answer; both "
            "must answer the same prompt"
        )
    if prompt[-1]["role"] == "assistant":
        raise UserError(f"{source}: prompt ends with an answer; it must end with the question")
    for name, messages in ((chosen_name, chosen), (rejected_name, rejected)):
        for place, message in (("first", messages[0]), ("last", messages[-1])):
            if message["role"] != "assistant":
                raise UserError(
                    f"{source}: {name}: the {place} message after the prompt is the "
                    f"{message['role']}'s, must be the assistant's"
                )
