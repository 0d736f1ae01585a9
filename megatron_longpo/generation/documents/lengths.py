"""Finds documents that are too short or too long, and tokenises no more than that requires."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_longpo.config.names import DocumentTooLong
from megatron_longpo.data.progress import Dropped
from megatron_longpo.generation.documents.token_spans import SpansOf, TokenSpans, find_token_spans


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthBounds:
    """In tokens; None = no bound."""

    min_tokens: int | None = None
    max_tokens: int | None = None
    too_long: DocumentTooLong = "cut"


def fit_document(text: str, spans_of: SpansOf, bounds: LengthBounds) -> tuple[str, TokenSpans]:
    """Cuts a text at its end if it is too long; returns it with the places of its tokens.

    Raises:
        Dropped: a document that is too short, or too long and not to be cut.
    """
    too_short = Dropped("document under min_document_tokens")
    # A token is at least one byte.
    if bounds.min_tokens is not None and len(text.encode()) < bounds.min_tokens:
        raise too_short
    tokens = find_token_spans(text, spans_of, at_most=bounds.max_tokens)
    if bounds.max_tokens is not None and len(tokens) > bounds.max_tokens:
        if bounds.too_long == "drop":
            raise Dropped("document over max_document_tokens")
        # Before the first token too many, so that the last one is not torn.
        text = text[: int(tokens.starts[bounds.max_tokens])]
        tokens = tokens.first(bounds.max_tokens)
    if bounds.min_tokens is not None and len(tokens) < bounds.min_tokens:
        raise too_short
    return text, tokens
