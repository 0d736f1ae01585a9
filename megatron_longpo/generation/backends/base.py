"""Requests and completions, and the interface of all backends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer, Message


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy."""

    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A conversation that the model continues."""

    messages: tuple[Message, ...]
    """Chat messages; the last one is the user's."""
    sampling: Sampling
    seed: int
    """Of this request's samples, which do not depend on other requests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What a model wrote, without special tokens."""

    text: str
    finished: bool
    """Whether the model ended by itself, before the most tokens allowed."""


class BackendError(Exception):
    """One request failed after all its retries; the text is the reason that is counted.

    It is returned instead of a completion, never raised: the document is put aside and the run
    continues.
    """


class Backend(Protocol):
    """A model that answers conversations."""

    tokenizer: ChatTokenizer
    """Counts tokens and makes prompts, for every backend."""
    context_length: int
    """Most tokens of a prompt and its answer together."""
    documents_at_once: int
    """Documents that a caller should work on at the same time."""

    async def complete(self, requests: Sequence[Request]) -> list[Completion | BackendError]:
        """Answers one document's requests, in order.

        Greedy answers depend on these requests alone, rounding aside, so a resumed run writes the
        same text.

        Raises:
            UserError: no more requests can be answered, as when a server stays unreachable.
        """

    async def close(self) -> None:
        """Frees what the backend holds; it answers nothing after that."""
