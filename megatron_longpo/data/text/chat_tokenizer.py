"""The interface of a tokenizer with a chat template, whatever its format."""

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
"""Texts whose ids are cached: more than the prompts and answers of one example."""


class ChatTokenizer(ABC):
    """A tokenizer for rows and generation. It reads the text of a special token as that token."""

    name: str
    """Path or hub id, for messages."""
    vocab_size: int
    eos_ids: tuple[int, ...]
    """Ids that end a turn or a text."""
    special_texts: tuple[str, ...]
    """Texts that `encode` turns into one token everywhere and that are markup, not words: special
    tokens, and other markup of the chat template such as Qwen3's `<think>`."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, with nothing added before or after."""
        return self.ids(text).tolist()

    def ids(self, text: str) -> np.ndarray:
        """Returns the same as [S] int64, read-only; recent texts are cached."""
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
        """Returns [S] int64, the character of `text` at which each token begins; None if the
        tokenizer cannot tell."""
        return None

    @abstractmethod
    def spans(self, text: str) -> np.ndarray:
        """Returns [num_tokens, 2]: the characters [start, end) of each token of `encode(text)`."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = False) -> str:
        """Returns the text of `ids`, with all spaces kept."""

    @abstractmethod
    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Returns the conversation as text, by the chat template."""


_WORD = re.compile(r"\s?\S{1,40}|\s+?")


def spans_by_words(text: str, count_tokens: Callable[[str], int]) -> np.ndarray:
    """Estimates [num_tokens, 2] spans by dividing each word evenly among its tokens.

    For tokenizers that do not give spans. A word alone may have one token more than within a text.
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
    """Returns the error for a conversation that a chat template refuses."""
    reason = " ".join(str(error).split())
    return UserError(
        f"{name}: its chat template refuses this conversation ({reason}); "
        "set another with chat_template, or leave out the system prompt"
    )
