"""Rows of short prompts on which policy and base model are compared token by token."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_longpo.config.evaluation import RetentionConfig
from megatron_longpo.data.jsonl import JsonlFile
from megatron_longpo.data.rows.schema import IGNORED_LABEL
from megatron_longpo.data.text.chat import conversation_row, prompt_ids
from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer, Message
from megatron_longpo.errors import UserError
from megatron_longpo.evaluation.chats import CHATS
from megatron_longpo.evaluation.probes import ProbeBranch, ProbeRow, ProbeSet

KEY = "evaluation.retention"
ROLES = ("system", "user", "assistant")


def make_retention(config: RetentionConfig, tokenizer: ChatTokenizer) -> ProbeSet:
    """Makes a row for each prompt.

    Of a conversation, the predictions of its answers are compared, end of turn included. Of a
    prompt without an answer, the predictions of all tokens but the first are compared.

    Raises:
        UserError: if a line is not a prompt, or is too long.
    """
    rows: list[ProbeRow] = []
    for where, messages in _conversations(config.prompts):
        if messages[-1]["role"] == "assistant":
            row = conversation_row(tokenizer, messages)
            ids, is_target = row.input_ids, row.labels != IGNORED_LABEL
        else:
            ids = np.array(prompt_ids(tokenizer, messages))
            is_target = np.ones(len(ids), dtype=bool)
        is_target[0] = False
        if len(ids) > config.max_length:
            raise UserError(
                f"{where}: has {len(ids)} tokens; short prompts have at most "
                f"{KEY}.max_length ({config.max_length})"
            )
        targets = np.flatnonzero(is_target)
        branch = ProbeBranch(
            input_ids=ids.astype(np.int32), targets=targets, groups=np.zeros_like(targets)
        )
        rows.append(ProbeRow(id=where, branches=(branch,)))
    return ProbeSet(rows, compares=True)


def _conversations(path: str | None) -> list[tuple[str, list[Message]]]:
    """Returns the source of each conversation, for messages, and its messages."""
    if path is None:
        return [
            (
                f"built-in chat {number}",
                [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ],
            )
            for number, (question, answer) in enumerate(CHATS, start=1)
        ]
    lines = JsonlFile(path)
    if not len(lines):
        raise UserError(f"{KEY}.prompts ({path}): is empty; give JSONL with messages or prompt")
    return [
        (lines.where(index), _messages(lines[index], lines.where(index)))
        for index in range(len(lines))
    ]


def _messages(line: dict[str, Any], where: str) -> list[Message]:
    prompt, messages = line.get("prompt"), line.get("messages")
    if messages is None and isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    is_right = isinstance(messages, list) and all(
        isinstance(message, dict)
        and message.get("role") in ROLES
        and isinstance(message.get("content"), str)
        for message in messages
    )
    if not is_right or not messages:
        raise UserError(
            f"{where}: needs prompt, a text, or messages, a list of objects with role (system, "
            "user, assistant) and content"
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]
