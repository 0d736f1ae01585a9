"""Finds what a set of texts holds beside texts, such as tool calls: a row cannot carry it.

Such content is never left out silently. A column that the first item of a set has is refused at the
start. In a later item, or in a message, it drops that item, which is counted with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_longpo.data.progress import Dropped
from megatron_longpo.errors import UserError

_MEDIA = ("images", "videos", "audios", "image", "video", "audio", "objects")
_TOOLS = ("tools", "functions")
_SYSTEM = ("system", "system_prompt")
COLUMNS = (
    *_TOOLS,
    *_MEDIA,
    *(f"rejected_{name}" for name in (*_TOOLS, *_MEDIA)),
    "chat_template_kwargs",
)
"""Columns that change what a model reads, and that no form can put into a row."""

MESSAGE_FIELDS = (
    *("tool_calls", "tool_call_id", "function_call"),
    *("reasoning_content", "reasoning", "thinking"),
    *_TOOLS,
    *_MEDIA,
)
TOOL_ROLES = (
    *("tool", "function", "ipython"),
    *("tool_call", "tool_response", "function_call", "observation"),
)
"""Roles of tool calls and their results, as OpenAI, Llama, ms-swift and LLaMA-Factory name them."""


def refuse_columns(columns: Mapping[str, Any], *, reads_system: bool, source: str) -> None:
    """Raises `UserError` if the first item of a set has a column that a row cannot carry."""
    name = uncarried_column(columns, reads_system=reads_system)
    if name in _SYSTEM:
        raise UserError(
            f"{source}: has a column {name}, which this form does not define; put it into the "
            'messages as {"role": "system"}, or remove it and give one for all with system'
        )
    if name is not None:
        raise UserError(
            f"{source}: has a column {name}, and rows hold only texts; write it into the texts, "
            "or remove the column"
        )


def drop_columns(columns: Mapping[str, Any], *, reads_system: bool) -> None:
    """Raises `Dropped` if an item has a column that a row cannot carry."""
    name = uncarried_column(columns, reads_system=reads_system)
    if name is not None:
        raise Dropped(f"column {name}")


def uncarried_column(columns: Mapping[str, Any], *, reads_system: bool) -> str | None:
    """Returns the name of a column that holds something a row cannot carry, or None."""
    names = COLUMNS if reads_system else (*COLUMNS, *_SYSTEM)
    return next((name for name in names if _holds_something(columns.get(name))), None)


def drop_message(message: Mapping[str, Any], role: Any) -> None:
    """Raises `Dropped` if a message has a field or a role that a row cannot carry."""
    for name in MESSAGE_FIELDS:
        if _holds_something(message.get(name)):
            raise Dropped(f"{name} in a message")
    if role in TOOL_ROLES:
        raise Dropped(f"message of the role {role}")


def _holds_something(value: Any) -> bool:
    """Tells whether a value is more than an empty one; sets write those as JSON text too."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    if isinstance(value, dict):  # Arrow fills the keys of structs with null
        return any(_holds_something(item) for item in value.values())
    return value is not None and value is not False and value != []
