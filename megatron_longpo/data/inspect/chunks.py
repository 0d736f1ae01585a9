"""Finds in a tokenised long row the chunk that each of its short rows holds."""

from __future__ import annotations

import numpy as np

from megatron_longpo.data.common_prefix import common_text_length
from megatron_longpo.data.rows.schema import IGNORED_LABEL, PreferenceRow
from megatron_longpo.data.text.chat import prompt_ids
from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer, Message
from megatron_longpo.data.trees.tree import answer_turns
from megatron_longpo.errors import UserError

_SHORTEST_CHUNK = 8
"""Least characters of a text that is searched for in a document as its chunk."""


def chunks_of_row(row: PreferenceRow, tokenizer: ChatTokenizer) -> list[str]:
    """Returns the part of the long row's document that each short prompt holds."""
    chunks: list[str] = []
    turns = answer_turns(row.chosen)
    for turn, short in enumerate(row.reference_chosen):
        long_prompt = tokenizer.decode(row.chosen.input_ids[: np.argmax(turns == turn)])
        prompt = tokenizer.decode(short.input_ids[: np.argmax(short.labels != IGNORED_LABEL)])
        chunk = _between_template_and_question(prompt, tokenizer)
        if len(chunk) < _SHORTEST_CHUNK or chunk not in long_prompt:
            chunk = _in_the_middle(prompt, long_prompt)
        if chunk:
            chunks.append(chunk)
    return chunks


def _between_template_and_question(prompt: str, tokenizer: ChatTokenizer) -> str:
    """Returns the chunk of a prompt made by `prompt_layout`; empty for another template."""
    mark = "\u2022mark\u2022"
    user: Message = {"role": "user", "content": mark}
    system: Message = {"role": "system", "content": mark}
    opening, found, _ = tokenizer.decode(prompt_ids(tokenizer, [user])).partition(mark)
    if found and prompt.startswith(opening):
        begin = len(opening)
    else:
        try:
            parts = tokenizer.decode(prompt_ids(tokenizer, [system, user])).split(mark)
        except UserError:
            return ""
        border = parts[1] if len(parts) == 3 and prompt.startswith(parts[0]) else ""
        begin = prompt.find(border) + len(border) if border and border in prompt else len(prompt)
    return prompt[begin : max(begin, prompt.rfind("\n\n"))].strip()


def _in_the_middle(prompt: str, long_prompt: str) -> str:
    """Returns the text of a short prompt between the ends that it shares with the long one.

    For rows of other makers. Empty if the chunk is at an end of the document.
    """
    head = common_text_length(prompt, long_prompt)
    tail = common_text_length(prompt[::-1], long_prompt[::-1])
    core = prompt[head : max(head, len(prompt) - tail)]
    at = long_prompt.find(core)
    if len(core) < _SHORTEST_CHUNK or at < 0:
        return ""
    # The shared ends may hold a little of the chunk: text that is equal around it belongs to it.
    left = common_text_length(prompt[:head][::-1], long_prompt[:at][::-1])
    end = head + len(core)
    right = common_text_length(prompt[end:], long_prompt[at + len(core) :])
    if left == head:  # the beginning of the template, not of the chunk
        left = 0
    return prompt[head - left : end + right].strip()
