"""Writes one document's example: chooses chunks, asks the model about them, checks its answers.

A document takes few calls of the backend: for all its questions, all chosen answers, all rejected
ones. So answers are written together and the document is read once.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_longpo.config.generate import GenerateConfig
from megatron_longpo.data.progress import Dropped
from megatron_longpo.data.text.chat import prompt_ids
from megatron_longpo.data.text.examples import Example
from megatron_longpo.data.text.prompt_layout import opening_messages, shorten_document
from megatron_longpo.errors import UserError
from megatron_longpo.generation.backends.base import (
    Backend,
    BackendError,
    Completion,
    Request,
    Sampling,
)
from megatron_longpo.generation.documents.chunking import chunk_document
from megatron_longpo.generation.documents.kinds import find_kind
from megatron_longpo.generation.documents.lengths import LengthBounds, fit_document
from megatron_longpo.generation.documents.reading import Document
from megatron_longpo.generation.documents.token_spans import TokenSpans, find_token_spans
from megatron_longpo.generation.questions.facts import holds_fact
from megatron_longpo.generation.questions.filters import Filters, same_answer
from megatron_longpo.generation.questions.instructions import Instruction, Instructions, Prepared
from megatron_longpo.generation.questions.prompts import phrase, question_request
from megatron_longpo.generation.questions.turns import (
    Answered,
    Asked,
    Question,
    lengths_of,
    meta_of,
)
from megatron_longpo.generation.shards.example_lengths import ExampleLengths

ATTEMPTS_PER_TURN = 3
"""Most chunks asked about for each turn wanted: dropped answers cost time too."""

MAX_QUESTION_TOKENS = 1024


@dataclass(kw_only=True, slots=True)
class Written:
    """A document's example, or why it has none."""

    example: Example | None = None
    lengths: ExampleLengths | None = None
    """None if there is no example."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Chunks and turns, or the document itself, by the reason why they were dropped."""
    num_tokens: int = 0
    """Tokens that the model wrote, dropped ones too."""


class ExampleWriter:
    """Asks a model about the chunks of documents, of several at once if the caller wishes."""

    def __init__(
        self,
        backend: Backend,
        config: GenerateConfig,
        instructions: Instructions,
        *,
        fingerprint: str,
    ) -> None:
        self.backend = backend
        self.config = config
        self.instructions = instructions
        self.fingerprint = fingerprint
        """Of the settings that change an example, for its `meta`."""
        self.filters = Filters(config.filters)
        context = backend.context_length
        self.chunk_min = config.chunk_min_tokens or context // 2
        self.chunk_max = config.chunk_max_tokens or context * 30000 // 32768
        self.bounds = LengthBounds(
            min_tokens=config.min_document_tokens,
            max_tokens=config.max_document_tokens,
            too_long=config.long_documents,
        )
        self.prompt_max = config.max_prompt_tokens or context - config.max_new_tokens
        if self.chunk_min > self.chunk_max:
            raise UserError(
                f"chunk_min_tokens ({self.chunk_min}): must not exceed chunk_max_tokens "
                f"({self.chunk_max})"
            )
        if self.chunk_max >= self.prompt_max:
            raise UserError(
                f"chunk_max_tokens ({self.chunk_max}): must be below max_prompt_tokens "
                f"({self.prompt_max}), which is the model's context less max_new_tokens by default"
            )

    async def write(self, document: Document) -> Written:
        """Writes the example of a document, or says why it has none.

        Raises:
            BackendError: the backend failed on one of its requests.
        """
        work = _DocumentWork(self, document)
        try:
            await work.write()
        except Dropped as dropped:
            work.written.dropped[str(dropped)] += 1
        return work.written

    def prompt_length(self, context: str, question: str) -> int:
        """Returns the tokens of the prompt that asks a question about a chunk or a document."""
        messages = opening_messages(self.config.system, context, question)
        return len(prompt_ids(self.backend.tokenizer, messages))

    def count_tokens(self, text: str) -> int:
        return len(self.backend.tokenizer.encode(text))


class _DocumentWork:
    """Writes one document's example; its random numbers are its own, so a resumed run is alike."""

    def __init__(self, writer: ExampleWriter, document: Document) -> None:
        self._writer = writer
        self._config = writer.config
        self._document = document
        self._rng = random.Random(f"{writer.config.seed} {document.id}")
        self.written = Written()

    async def write(self) -> None:
        spans_of = self._writer.backend.tokenizer.spans
        text, tokens = fit_document(self._document.text, spans_of, self._writer.bounds)
        kind = self._config.document_kind
        chunks = chunk_document(
            text,
            tokens=tokens,
            kind=find_kind(text, self._document.name) if kind == "auto" else kind,
            min_tokens=self._writer.chunk_min,
            max_tokens=self._writer.chunk_max,
        )
        if not chunks:
            raise Dropped("document without a chunk of the right length")
        most = ATTEMPTS_PER_TURN * self._config.turns
        candidates = self._rng.sample(chunks, len(chunks))[:most]
        prepared = self._writer.instructions.prepare(
            text, [(chunk.start, chunk.end) for chunk in candidates], self._rng
        )
        asked = await self._ask_about_chunks(prepared)
        answered = await self._answer_from_document(asked, prepared.document) if asked else []
        if not answered:
            raise Dropped("document without a good turn")
        if prepared.document is not text:  # facts were planted in it
            tokens = find_token_spans(prepared.document, spans_of)
        self.written.example = Example(
            id=self._document.id,
            document=prepared.document,
            turns=tuple(one.turn() for one in answered),
            meta=self._meta(tokens, answered),
        )
        self.written.lengths = lengths_of(
            prepared.document, tokens, answered, count_tokens=self._writer.count_tokens
        )

    def _meta(self, tokens: TokenSpans, answered: list[Answered]) -> dict[str, Any]:
        meta = {
            "source": self._document.source,
            "model": Path(self._config.model).name,
            "settings": self._writer.fingerprint,
            **meta_of(tokens, answered),
        }
        if self._config.rejected_candidates > 1:
            meta["rejected_candidates"] = [list(one.candidates) for one in answered]
        return meta

    # ------------------------------------------------------------ questions and chosen answers

    async def _ask_about_chunks(self, prepared: Prepared) -> list[Asked]:
        """Asks about as many chunks as turns are wanted; others replace those dropped."""
        left = list(range(len(prepared.spans)))
        asked: list[Asked] = []
        while left and len(asked) < self._config.turns:
            missing = self._config.turns - len(asked)
            now, left = left[:missing], left[missing:]
            asked += await self._chosen_answers(await self._questions(prepared, now))
        return asked

    async def _questions(self, prepared: Prepared, indices: list[int]) -> list[Question]:
        """Returns questions about some of the chunks; chunks without a question are left out."""
        chunks = [prepared.document[slice(*prepared.spans[index])] for index in indices]
        if self._writer.instructions.asks_model:
            instructions = await self._written_instructions(chunks)
        else:
            instructions = [
                self._writer.instructions.choose(prepared, index, self._document, self._rng)
                for index in indices
            ]
        questions = []
        for index, chunk, instruction in zip(indices, chunks, instructions, strict=True):
            if instruction is None:
                self._drop(
                    "chunk whose questions did not parse"
                    if self._writer.instructions.asks_model
                    else "chunk without a question about it"
                )
                continue
            text = phrase(instruction.question, self._rng)
            if self._writer.prompt_length(chunk, text) > self._writer.prompt_max:
                self._drop("chunk and question over max_prompt_tokens")
                continue
            span = prepared.spans[index]
            questions.append(Question(chunk=chunk, span=span, text=text, instruction=instruction))
        return questions

    async def _written_instructions(self, chunks: list[str]) -> list[Instruction | None]:
        """Asks the model for questions about each chunk, and chooses one of each."""
        sampling = Sampling(
            temperature=self._config.question_temperature,
            top_p=self._config.question_top_p,
            max_new_tokens=min(MAX_QUESTION_TOKENS, self._config.max_new_tokens),
        )
        completions = await self._complete(
            [self._request(chunk, question_request(), sampling) for chunk in chunks]
        )
        return [
            self._writer.instructions.written(completion.text, self._rng)
            for completion in completions
        ]

    async def _chosen_answers(self, questions: list[Question]) -> list[Asked]:
        sampling = self._sampling("chosen")
        completions = await self._complete(
            [self._request(one.chunk, one.text, sampling) for one in questions]
        )
        asked = []
        for question, completion in zip(questions, completions, strict=True):
            reason = self._fault(completion, "chosen", question)
            if reason is None and self._config.require_fact:
                missing = not holds_fact(completion.text, question.instruction.answer)
                reason = "chosen answer: without the fact" if missing else None
            if reason is None:
                asked.append(Asked(question=question, chosen=completion.text))
            else:
                self._drop(reason)
        return asked

    # ------------------------------------------------------------ rejected answers

    async def _answer_from_document(self, asked: list[Asked], document: str) -> list[Answered]:
        longest = max((one.question.text for one in asked), key=self._writer.count_tokens)
        # One cut for all turns, so that they share their prompt up to the question.
        read = shorten_document(
            document,
            count_tokens=lambda text: self._writer.prompt_length(text, longest),
            max_tokens=self._writer.prompt_max,
            keep=[one.question.span for one in asked],
        )
        if read is None:
            raise Dropped("document whose chunks are over max_prompt_tokens together")
        samplings = [self._sampling("rejected")]
        samplings += [self._candidate_sampling()] * (self._config.rejected_candidates - 1)
        completions = await self._complete(
            [
                self._request(read, one.question.text, sampling)
                for one in asked
                for sampling in samplings
            ]
        )
        answered = []
        for index, one in enumerate(asked):
            first = index * len(samplings)
            turn = self._choose_rejected(one, completions[first : first + len(samplings)])
            if turn is not None:
                answered.append(turn)
        return answered

    def _choose_rejected(self, asked: Asked, completions: list[Completion]) -> Answered | None:
        """Takes the first good answer that is not the chosen one; keeps other good ones too."""
        good: list[str] = []
        reasons = []
        for completion in completions:
            reason = self._fault(completion, "rejected", asked.question)
            reason = reason or self._writer.filters.pair_fault(asked.chosen, completion.text)
            if reason is not None:
                reasons.append(reason)
            elif not any(same_answer(other, completion.text) for other in good):
                good.append(completion.text)
        if not good:
            self._drop(reasons[0])
            return None
        return Answered(asked=asked, rejected=good[0], candidates=tuple(good[1:]))

    # ------------------------------------------------------------ what both need

    def _sampling(self, branch: str) -> Sampling:
        return Sampling(
            temperature=getattr(self._config, f"{branch}_temperature"),
            top_p=getattr(self._config, f"{branch}_top_p"),
            max_new_tokens=self._config.max_new_tokens,
        )

    def _candidate_sampling(self) -> Sampling:
        return Sampling(
            temperature=self._config.candidate_temperature,
            top_p=self._config.rejected_top_p,
            max_new_tokens=self._config.max_new_tokens,
        )

    def _request(self, context: str, question: str, sampling: Sampling) -> Request:
        messages = opening_messages(self._config.system, context, question)
        return Request(messages=tuple(messages), sampling=sampling, seed=self._rng.getrandbits(32))

    async def _complete(self, requests: Sequence[Request]) -> list[Completion]:
        if not requests:
            return []
        completions = []
        for completion in await self._writer.backend.complete(requests):
            if isinstance(completion, BackendError):
                raise completion
            completions.append(completion)
            self.written.num_tokens += self._writer.count_tokens(completion.text)
        return completions

    def _fault(self, completion: Completion, branch: str, question: Question) -> str | None:
        """Returns why an answer is dropped, or None."""
        return self._writer.filters.fault(
            completion.text,
            branch,
            finished=completion.finished,
            question=question.instruction.question,
            context=question.chunk,
        )

    def _drop(self, reason: str) -> None:
        self.written.dropped[reason] += 1
