"""Writing one document's example: which chunks are asked about, and what the model answers."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from megatron_longpo.data.chat import prompt_ids
from megatron_longpo.data.examples import Example, Turn
from megatron_longpo.data.progress import Dropped, format_counts
from megatron_longpo.data.prompt_layout import opening_messages, shorten_document
from megatron_longpo.errors import UserError
from megatron_longpo.generation.backends import Backend, Sampling
from megatron_longpo.generation.chunking import Chunk, chunk_document
from megatron_longpo.generation.config import GenerateConfig
from megatron_longpo.generation.documents import Document
from megatron_longpo.generation.facts import holds_fact
from megatron_longpo.generation.filters import fault, same_answer
from megatron_longpo.generation.lengths import LengthBounds, fit_document
from megatron_longpo.generation.prompts import (
    choose_fact,
    parse_questions,
    phrase,
    question_request,
)
from megatron_longpo.generation.structure import find_kind

ATTEMPTS_PER_TURN = 3
"""Chunks asked about, at most, for each turn wanted: answers that are dropped cost time too."""

MAX_QUESTION_TOKENS = 1024


@dataclass(kw_only=True)
class GenerateSummary:
    """What became of the documents."""

    num_documents: int = 0
    num_resumed: int = 0
    num_examples: int = 0
    num_turns: int = 0
    seconds: float = 0.0
    dropped: Counter[str] = field(default_factory=Counter)
    """Documents, chunks and turns by the reason why they gave nothing."""

    def __str__(self) -> str:
        text = (
            f"{self.num_examples} examples with {self.num_turns} turns from "
            f"{self.num_documents} documents in {self.seconds:.0f} s"
        )
        if self.num_resumed:
            text += f" ({self.num_resumed} examples were there already)"
        if self.dropped:
            text += f"; dropped: {format_counts(self.dropped)}"
        return text


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A chunk, its question as put to the model, and the chosen answer."""

    chunk: Chunk
    question: str
    chosen: str
    kind: str
    fact: tuple[str, ...]


class ExampleWriter:
    """Asks a model about the chunks of documents, one document at a time."""

    def __init__(
        self,
        backend: Backend,
        config: GenerateConfig,
        instructions: list[str] | None,
        *,
        settings: str,
    ) -> None:
        self._backend = backend
        self._config = config
        self._instructions = instructions
        self._settings = settings
        context = backend.context_length
        self._chunk_min = config.chunk_min_tokens or context // 2
        self._chunk_max = config.chunk_max_tokens or context * 30000 // 32768
        self._bounds = LengthBounds(
            min_tokens=config.min_document_tokens,
            max_tokens=config.max_document_tokens,
            too_long=config.long_documents,
        )
        self._prompt_max = config.max_prompt_tokens or context - config.max_new_tokens
        self.summary = GenerateSummary()
        if self._chunk_min > self._chunk_max:
            raise UserError(
                f"chunk_min_tokens ({self._chunk_min}): must not exceed chunk_max_tokens "
                f"({self._chunk_max})"
            )
        if self._chunk_max >= self._prompt_max:
            raise UserError(
                f"chunk_max_tokens ({self._chunk_max}): must be below max_prompt_tokens "
                f"({self._prompt_max}), which is the model's context less max_new_tokens by default"
            )

    def example(self, document: Document) -> Example:
        """The example of a document; raises `Dropped` where it has none."""
        # Every document has its own random numbers, so a resumed run makes the same choices.
        rng = random.Random(f"{self._config.seed} {document.id}")
        self._backend.forget()
        text, tokens = fit_document(document.text, self._backend.tokenizer.spans, self._bounds)
        kind = self._config.document_kind
        chunks = chunk_document(
            text,
            tokens=tokens,
            kind=find_kind(text, document.name) if kind == "auto" else kind,
            min_tokens=self._chunk_min,
            max_tokens=self._chunk_max,
        )
        if not chunks:
            raise Dropped("document without a chunk of the right length")
        asked = self._ask_about_chunks(chunks, text, rng)
        turns = self._answer_from_document(asked, text, rng)
        if not turns:
            raise Dropped("document without a good turn")
        return Example(
            id=document.id,
            document=text,
            turns=tuple(turn for _, turn in turns),
            meta={
                "source": document.source,
                "model": Path(self._config.model).name,
                "settings": self._settings,
                "kinds": [one.kind for one, _ in turns],
                "facts": [list(one.fact) for one, _ in turns],
                "document_tokens": len(tokens),
                "chunk_token_spans": [
                    [one.chunk.first_token, one.chunk.last_token] for one, _ in turns
                ],
            },
        )

    # ------------------------------------------------------------ questions and chosen answers

    def _ask_about_chunks(
        self, chunks: list[Chunk], document: str, rng: random.Random
    ) -> list[Asked]:
        asked: list[Asked] = []
        candidates = rng.sample(chunks, len(chunks))[: ATTEMPTS_PER_TURN * self._config.turns]
        for chunk in candidates:
            if len(asked) == self._config.turns:
                break
            try:
                asked.append(self._ask(chunk, document, rng))
            except Dropped as dropped:
                self.summary.dropped[str(dropped)] += 1
        return asked

    def _ask(self, chunk: Chunk, document: str, rng: random.Random) -> Asked:
        kind, fact = self._config.instructions, tuple[str, ...]()
        if self._instructions is not None:
            kind, question = "file", rng.choice(self._instructions)
        elif kind == "template":
            found = choose_fact(chunk.text, document, rng, checkable=self._config.require_fact)
            if found is None:
                raise Dropped("chunk without a fact to ask for")
            kind, question, fact = found.kind, found.question, found.answer
        else:
            question = self._written_question(chunk, rng)
        question = phrase(question, rng)
        prompt = self._prompt(chunk.text, question)
        if len(prompt) > self._prompt_max:
            raise Dropped("chunk and question over max_prompt_tokens")
        chosen = self._write(prompt, "chosen", rng)
        if self._config.require_fact and not holds_fact(chosen, fact):
            raise Dropped("chosen answer without the fact")
        return Asked(chunk=chunk, question=question, chosen=chosen, kind=kind, fact=fact)

    def _written_question(self, chunk: Chunk, rng: random.Random) -> str:
        """One of the questions that the model writes about a chunk."""
        sampling = Sampling(
            temperature=self._config.question_temperature,
            top_p=self._config.question_top_p,
            max_new_tokens=min(MAX_QUESTION_TOKENS, self._config.max_new_tokens),
        )
        prompt = self._prompt(chunk.text, question_request())
        completion = self._backend.complete(prompt, sampling, seed=rng.getrandbits(32))
        questions = parse_questions(completion.text)
        if questions is None:
            raise Dropped("chunk whose questions did not parse")
        return rng.choice(questions)

    # ------------------------------------------------------------ rejected answers

    def _answer_from_document(
        self, asked: list[Asked], document: str, rng: random.Random
    ) -> list[tuple[Asked, Turn]]:
        if not asked:
            return []
        longest = max((one.question for one in asked), key=self._count_tokens)
        # One cut for all turns, so that they share their prompt up to the question.
        read = shorten_document(
            document,
            count_tokens=lambda text: len(self._prompt(text, longest)),
            max_tokens=self._prompt_max,
            keep=[(one.chunk.start, one.chunk.end) for one in asked],
        )
        if read is None:
            raise Dropped("document whose chunks are over max_prompt_tokens together")
        turns: list[tuple[Asked, Turn]] = []
        for one in asked:
            try:
                turns.append((one, self._turn(one, read, rng)))
            except Dropped as dropped:
                self.summary.dropped[str(dropped)] += 1
        return turns

    def _turn(self, asked: Asked, document: str, rng: random.Random) -> Turn:
        rejected = self._write(self._prompt(document, asked.question), "rejected", rng)
        if same_answer(asked.chosen, rejected):
            raise Dropped("rejected answer the same as the chosen one")
        return Turn(
            chunk=asked.chunk.text,
            chunk_span=(asked.chunk.start, asked.chunk.end),
            question=asked.question,
            chosen=asked.chosen,
            rejected=rejected,
        )

    # ------------------------------------------------------------ both

    def _write(self, prompt: list[int], branch: str, rng: random.Random) -> str:
        """An answer; raises `Dropped` where it is not good enough."""
        sampling = Sampling(
            temperature=getattr(self._config, f"{branch}_temperature"),
            top_p=getattr(self._config, f"{branch}_top_p"),
            max_new_tokens=self._config.max_new_tokens,
        )
        completion = self._backend.complete(prompt, sampling, seed=rng.getrandbits(32))
        if not completion.finished and self._config.unfinished == "drop":
            raise Dropped(f"{branch} answer unfinished")
        if (reason := fault(completion.text, branch)) is not None:
            raise Dropped(reason)
        return completion.text

    def _prompt(self, context: str, question: str) -> list[int]:
        messages = opening_messages(self._config.system, context, question)
        return prompt_ids(self._backend.tokenizer, messages)

    def _count_tokens(self, text: str) -> int:
        return len(self._backend.tokenizer.encode(text))
