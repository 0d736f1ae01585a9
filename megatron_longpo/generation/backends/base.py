"""What a backend is asked and what it gives, whatever model or server stands behind it."""

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
    """A conversation that the model goes on with."""

    messages: tuple[Message, ...]
    """Chat messages; the last one is the user's."""
    sampling: Sampling
    seed: int
    """Of this request's samples; they do not depend on the requests beside it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What a model wrote, special tokens left out."""

    text: str
    finished: bool
    """Whether the model ended by itself rather than at the most tokens allowed."""


class BackendError(Exception):
    """One request failed for good, after its retries; the text is the reason that is counted.

    It is returned in place of a completion, never raised: the document is put aside and the run
    goes on.
    """


class Backend(Protocol):
    """A model that answers conversations."""

    tokenizer: ChatTokenizer
    """Counts tokens and makes prompts, for every backend."""
    context_length: int
    """Most tokens of a prompt and its answer together."""
    documents_at_once: int
    """How many documents a caller should work on at the same time."""

    async def complete(self, requests: Sequence[Request]) -> list[Completion | BackendError]:
        """Answers one document's requests, in order.

        Greedy answers depend on these requests alone, rounding aside, so a resumed run writes the
        same text.

        Raises:
            UserError: nothing can be answered any more, as when a server stays away.
        """

    async def close(self) -> None:
        """Gives back what the backend holds; it answers nothing after that."""
