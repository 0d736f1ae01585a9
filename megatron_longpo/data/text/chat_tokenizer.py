"""What rows and generation need of a tokenizer, whatever its format."""

from __future__ import annotations

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache

import numpy as np

from megatron_longpo.errors import UserError

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`."""

_NUM_REMEMBERED = 32
"""Texts whose ids are remembered: more than the prompts and answers of one example, which come
again in its other rows."""


class ChatTokenizer(ABC):
    """What rows and generation need of a tokenizer; the text of special tokens is read as such."""

    name: str
    """The path or hub id it came from, for messages."""
    vocab_size: int
    eos_ids: tuple[int, ...]
    """Ids that end a turn or a text."""
    special_texts: tuple[str, ...]
    """Texts that `encode` turns into one token, wherever they stand, and that are no one's words:
    special tokens, and further markup of the chat template such as Qwen3's `<think>`."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with nothing put before or after it."""
        return self.ids(text).tolist()

    def ids(self, text: str) -> np.ndarray:
        """[S] int64, read-only: the same, remembered for a while."""
        return self._remembered_ids(text)

    @cached_property
    def _remembered_ids(self) -> Callable[[str], np.ndarray]:
        def encode(text: str) -> np.ndarray:
            ids = np.array(self._encode(text), dtype=np.int64)
            ids.flags.writeable = False
            return ids

        return lru_cache(maxsize=_NUM_REMEMBERED)(encode)

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    def token_starts(self, text: str) -> np.ndarray | None:
        """[S] int64: the character of `text` where each of its tokens begins; None where the
        tokenizer does not tell."""
        return None

    @abstractmethod
    def spans(self, text: str) -> np.ndarray:
        """Characters [start, end) that each token of `encode(text)` stands for, [num_tokens, 2]."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = False) -> str:
        """The text of `ids`, spaces as they are."""

    @abstractmethod
    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text, by the chat template."""


_WORD = re.compile(r"\s?\S{1,40}|\s+?")


def spans_by_words(text: str, count_tokens: Callable[[str], int]) -> np.ndarray:
    """Spans for a tokenizer that does not tell them: of words, shared out among their tokens.

    [num_tokens, 2]. A word by itself may have a token more than within a text.
    """
    spans: list[tuple[int, int]] = []
    counts: dict[str, int] = {}
    for found in _WORD.finditer(text):
        word, start = found[0], found.start()
        if word not in counts:
            counts[word] = count_tokens(word)
        edges = np.linspace(start, found.end(), counts[word] + 1).round().astype(int).tolist()
        spans += itertools.pairwise(edges)
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def template_error(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(
        f"{name}: its chat template refuses this conversation ({reason}); "
        "set another with chat_template, or leave out the system prompt"
    )
