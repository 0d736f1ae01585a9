"""Turns on their way to an example: a question, its chosen answer, its rejected answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_longpo.data.text.examples import Turn
from megatron_longpo.generation.documents.token_spans import TokenSpans
from megatron_longpo.generation.questions.instructions import Instruction
from megatron_longpo.generation.questions.planting import Span
from megatron_longpo.generation.shards.example_lengths import ExampleLengths


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question about a chunk, in the words that the model reads."""

    chunk: str
    span: Span
    """Of the chunk, in characters of the document."""
    text: str
    instruction: Instruction


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A question with its chosen answer."""

    question: Question
    chosen: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """A question with both answers."""

    asked: Asked
    rejected: str
    candidates: tuple[str, ...]
    """Other good answers from the whole document."""

    def turn(self) -> Turn:
        question = self.asked.question
        return Turn(
            chunk=question.chunk,
            chunk_span=question.span,
            question=question.text,
            chosen=self.asked.chosen,
            rejected=self.rejected,
        )


def meta_of(tokens: TokenSpans, answered: Sequence[Answered]) -> dict[str, Any]:
    """Returns what `meta` of an example says about its turns and their chunks.

    Args:
        tokens: of the document.
        answered: the example's turns.
    """
    questions = [one.asked.question for one in answered]
    return {
        "kinds": [question.instruction.kind for question in questions],
        "facts": [list(question.instruction.answer) for question in questions],
        "document_tokens": len(tokens),
        "chunk_token_spans": [list(tokens.tokens_of(*one.span)) for one in questions],
    }


def lengths_of(
    document: str,
    tokens: TokenSpans,
    answered: Sequence[Answered],
    *,
    count_tokens: Callable[[str], int],
) -> ExampleLengths:
    """Returns the lengths of an example's parts, and where its chunks are in the document."""
    questions = [one.asked.question for one in answered]
    middles = [sum(one.span) / 2 for one in questions]
    return ExampleLengths(
        document=len(tokens),
        chunk=[tokens.count(*one.span) for one in questions],
        question=[count_tokens(one.text) for one in questions],
        chosen=[count_tokens(one.asked.chosen) for one in answered],
        rejected=[count_tokens(one.rejected) for one in answered],
        position=[round(middle / len(document), 4) for middle in middles],
        kind=[one.instruction.kind for one in questions],
    )
