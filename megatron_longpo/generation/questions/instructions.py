"""The questions about a document: from the model, from facts in its chunks, or from a file."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longpo.config.generate import GenerateConfig
from megatron_longpo.errors import UserError, nearest
from megatron_longpo.generation.documents.reading import Document
from megatron_longpo.generation.questions.facts import FINDERS, Fact, choose_fact
from megatron_longpo.generation.questions.planted_facts import PLANTED_KINDS
from megatron_longpo.generation.questions.planting import Span, plant
from megatron_longpo.generation.questions.prompts import parse_questions


@dataclass(frozen=True, kw_only=True, slots=True)
class Instruction:
    """A question about a chunk, before it is tied to the text above it."""

    question: str
    kind: str
    """`model`, `file`, or the kind of the fact."""
    answer: tuple[str, ...] = ()
    """Words that a right answer holds; empty if unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A document ready to be asked about."""

    document: str
    spans: tuple[Span, ...]
    """The chunks, in characters of this document."""
    planted: tuple[Fact | None, ...]
    """The fact planted in each chunk."""


class Instructions:
    """Gives questions from the source that `instructions` names."""

    def __init__(self, config: GenerateConfig) -> None:
        self._config = config
        self._general: list[str] = []
        self._by_document: dict[str, list[str]] = {}
        source = config.instructions
        if source not in ("model", "template", "planted"):
            self._general, self._by_document = read_instructions(source)
        self.asks_model = source == "model"
        """Whether `written` is used, with what the model answers to `prompts.question_request`."""
        _check_kinds(config)

    def prepare(self, document: str, spans: Sequence[Span], rng: random.Random) -> Prepared:
        """Plants a fact in each chunk if `instructions` is `planted`, else changes nothing."""
        facts: list[Fact | None] = [None] * len(spans)
        spans = tuple(spans)
        if self._config.instructions == "planted":
            for index in range(len(spans)):
                planting = plant(
                    document,
                    spans,
                    index,
                    rng,
                    split=self._config.fact_split,
                    kinds=self._config.fact_kinds,
                )
                if planting is not None:
                    document, spans = planting.document, planting.spans
                    facts[index] = planting.fact
        return Prepared(document=document, spans=spans, planted=tuple(facts))

    def choose(
        self, prepared: Prepared, index: int, document: Document, rng: random.Random
    ) -> Instruction | None:
        """Chooses a question about chunk `index` without a model; None if there is none."""
        source = self._config.instructions
        if source in ("planted", "template"):
            fact = prepared.planted[index]
            if source == "template":
                start, end = prepared.spans[index]
                fact = choose_fact(
                    prepared.document[start:end],
                    prepared.document,
                    rng,
                    checkable=self._config.require_fact,
                    kinds=self._config.fact_kinds,
                )
            if fact is None:
                return None
            return Instruction(question=fact.question, kind=fact.kind, answer=fact.answer)
        names = (document.id, document.source, Path(document.source).name)
        own = next((self._by_document[name] for name in names if name in self._by_document), None)
        questions = own or self._general
        return Instruction(question=rng.choice(questions), kind="file") if questions else None

    def written(self, text: str, rng: random.Random) -> Instruction | None:
        """Chooses one of the questions that the model wrote; None if they do not parse."""
        questions = parse_questions(text, least=self._config.least_questions)
        return Instruction(question=rng.choice(questions), kind="model") if questions else None


def read_instructions(path: str) -> tuple[list[str], dict[str, list[str]]]:
    """Reads a file of questions: those for every document, and those for single ones by id.

    A `.jsonl` file has objects with `question` and, for one document, `document_id`: its id, its
    path or its file name. Any other file has one question a line.
    """
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"instructions ({path}): neither model, template nor planted, and not a readable file "
            f"({error})"
        ) from error
    general: list[str] = []
    by_document: defaultdict[str, list[str]] = defaultdict(list)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if file.suffix != ".jsonl":
            general.append(line.strip())
            continue
        question, document_id = _question_line(line, f"instructions ({path}:{number})")
        (general if document_id is None else by_document[document_id]).append(question)
    if not general and not by_document:
        raise UserError(f"instructions ({path}): holds no instruction; write one a line")
    return general, dict(by_document)


def _question_line(line: str, where: str) -> tuple[str, str | None]:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not a JSON object ({error}); write one object a line") from error
    question = value.get("question") if isinstance(value, dict) else None
    if not isinstance(question, str) or not question.strip():
        raise UserError(f'{where}: question is missing or no text; write {{"question": ...}}')
    document_id = value.get("document_id")
    if document_id is not None and not isinstance(document_id, str):
        raise UserError(f"{where}: document_id ({document_id}) must be text")
    return question.strip(), document_id


def _check_kinds(config: GenerateConfig) -> None:
    if config.fact_kinds is None:
        return
    if config.instructions == "planted":
        known = [name for name, kind in PLANTED_KINDS.items() if kind.split == config.fact_split]
    else:
        known = list(FINDERS)
    for name in config.fact_kinds:
        if name not in known:
            hint = nearest(name, known) or ", ".join(known)
            raise UserError(f"fact_kinds ({name}): no such kind here. There is {hint}")
