"""Writing one document's example: which chunks are asked about, and what the model answers."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from megatron_longpo.data.chat import prompt_ids
from megatron_longpo.data.examples import Example, Turn
from megatron_longpo.data.progress import Dropped, format_counts
from megatron_longpo.data.prompt_layout import opening_messages, shorten_document
from megatron_longpo.errors import UserError
from megatron_longpo.generation.backends.base import (
    Backend,
    BackendError,
    Completion,
    Request,
    Sampling,
)
from megatron_longpo.generation.chunking import Chunk, chunk_document
from megatron_longpo.generation.config import GenerateConfig
from megatron_longpo.generation.documents import Document
from megatron_longpo.generation.facts import holds_fact
from megatron_longpo.generation.filters import Filters
from megatron_longpo.generation.instructions import Instruction, Instructions, Prepared
from megatron_longpo.generation.prompts import phrase, question_request

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
    instruction: Instruction


class ExampleWriter:
    """Asks a model about the chunks of documents, one document at a time."""

    def __init__(
        self,
        backend: Backend,
        config: GenerateConfig,
        instructions: Instructions,
        *,
        settings: str,
    ) -> None:
        self._backend = backend
        self._config = config
        self._instructions = instructions
        self._settings = settings
        self._filters = Filters(config.filters)
        context = backend.context_length
        self._chunk_min = config.chunk_min_tokens or context // 2
        self._chunk_max = config.chunk_max_tokens or context * 30000 // 32768
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

    async def example(self, document: Document) -> Example:
        """The example of a document; raises `Dropped` where it has none."""
        # Every document has its own random numbers, so a resumed run makes the same choices.
        rng = random.Random(f"{self._config.seed} {document.id}")
        text = self._within_bound(document.text)
        chunks = chunk_document(
            text,
            count_tokens=self._count_tokens,
            min_tokens=self._chunk_min,
            max_tokens=self._chunk_max,
        )
        if not chunks:
            raise Dropped("document without a chunk of the right length")
        candidates = rng.sample(chunks, len(chunks))[: ATTEMPTS_PER_TURN * self._config.turns]
        prepared = self._instructions.prepare(
            text, [(chunk.start, chunk.end) for chunk in candidates], rng
        )
        text = prepared.document
        asked = await self._ask_about_chunks(prepared, document, rng)
        turns = await self._answer_from_document(asked, text, rng)
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
                "kinds": [one.instruction.kind for one, _ in turns],
                "facts": [list(one.instruction.answer) for one, _ in turns],
            },
        )

    # ------------------------------------------------------------ questions and chosen answers

    async def _ask_about_chunks(
        self, prepared: Prepared, document: Document, rng: random.Random
    ) -> list[Asked]:
        asked: list[Asked] = []
        for index in range(len(prepared.spans)):
            if len(asked) == self._config.turns:
                break
            try:
                asked.append(await self._ask(prepared, index, document, rng))
            except Dropped as dropped:
                self.summary.dropped[str(dropped)] += 1
        return asked

    async def _ask(
        self, prepared: Prepared, index: int, document: Document, rng: random.Random
    ) -> Asked:
        start, end = prepared.spans[index]
        chunk = Chunk(text=prepared.document[start:end], start=start, end=end)
        if self._instructions.asks_model:
            instruction = await self._written_question(chunk, rng)
        else:
            found = self._instructions.choose(prepared, index, document, rng)
            if found is None:
                raise Dropped("chunk without a question about it")
            instruction = found
        question = phrase(instruction.question, rng)
        if len(self._prompt(chunk.text, question)) > self._prompt_max:
            raise Dropped("chunk and question over max_prompt_tokens")
        asked = Asked(chunk=chunk, question=question, instruction=instruction, chosen="")
        chosen = await self._write(chunk.text, asked, "chosen", rng)
        if self._config.require_fact and not holds_fact(chosen, instruction.answer):
            raise Dropped("chosen answer: without the fact")
        return dataclasses.replace(asked, chosen=chosen)

    async def _written_question(self, chunk: Chunk, rng: random.Random) -> Instruction:
        """One of the questions that the model writes about a chunk."""
        sampling = Sampling(
            temperature=self._config.question_temperature,
            top_p=self._config.question_top_p,
            max_new_tokens=min(MAX_QUESTION_TOKENS, self._config.max_new_tokens),
        )
        completion = await self._complete(chunk.text, question_request(), sampling, rng)
        instruction = self._instructions.written(completion.text, rng)
        if instruction is None:
            raise Dropped("chunk whose questions did not parse")
        return instruction

    # ------------------------------------------------------------ rejected answers

    async def _answer_from_document(
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
                turns.append((one, await self._turn(one, read, rng)))
            except Dropped as dropped:
                self.summary.dropped[str(dropped)] += 1
        return turns

    async def _turn(self, asked: Asked, document: str, rng: random.Random) -> Turn:
        rejected = await self._write(document, asked, "rejected", rng)
        if (reason := self._filters.pair_fault(asked.chosen, rejected)) is not None:
            raise Dropped(reason)
        return Turn(
            chunk=asked.chunk.text,
            chunk_span=(asked.chunk.start, asked.chunk.end),
            question=asked.question,
            chosen=asked.chosen,
            rejected=rejected,
        )

    # ------------------------------------------------------------ both

    async def _write(self, context: str, asked: Asked, branch: str, rng: random.Random) -> str:
        """An answer; raises `Dropped` where it is not good enough."""
        sampling = Sampling(
            temperature=getattr(self._config, f"{branch}_temperature"),
            top_p=getattr(self._config, f"{branch}_top_p"),
            max_new_tokens=self._config.max_new_tokens,
        )
        completion = await self._complete(context, asked.question, sampling, rng)
        reason = self._filters.fault(
            completion.text,
            branch,
            finished=completion.finished,
            question=asked.instruction.question,
            context=asked.chunk.text,
        )
        if reason is not None:
            raise Dropped(reason)
        return completion.text

    async def _complete(
        self, context: str, question: str, sampling: Sampling, rng: random.Random
    ) -> Completion:
        messages = opening_messages(self._config.system, context, question)
        request = Request(messages=tuple(messages), sampling=sampling, seed=rng.getrandbits(32))
        (completion,) = await self._backend.complete([request])
        if isinstance(completion, BackendError):
            raise Dropped(f"answer that failed: {completion}")
        return completion

    def _prompt(self, context: str, question: str) -> list[int]:
        messages = opening_messages(self._config.system, context, question)
        return prompt_ids(self._backend.tokenizer, messages)

    def _count_tokens(self, text: str) -> int:
        return len(self._backend.tokenizer.encode(text))

    def _within_bound(self, document: str) -> str:
        if self._config.max_document_tokens is None:
            return document
        shorter = shorten_document(
            document,
            count_tokens=self._count_tokens,
            max_tokens=self._config.max_document_tokens,
            cut_from="tail",
        )
        assert shorter is not None  # nothing is kept, so anything can be cut
        return shorter
