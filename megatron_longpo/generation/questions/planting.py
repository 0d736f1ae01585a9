"""Puts a made-up fact into a chunk of a document, between paragraphs or sentences."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_longpo.config.names import FactSplit
from megatron_longpo.generation.questions.facts import Fact
from megatron_longpo.generation.questions.planted_facts import PLANTED_KINDS, made_up_fields

Span = tuple[int, int]

ATTEMPTS = 100
"""Most facts that are made up until one has no name that the document has."""

_BORDERS = (
    (re.compile(r"(?:\n[ \t\r]*)+\n"), "\n\n"),  # before a paragraph
    (re.compile(r"\n"), "\n"),  # before a line
    (re.compile(r"[.!?]\s+"), " "),  # before a sentence
    (re.compile(r"\s+"), " "),  # before a word
)
"""Where a sentence may be inserted, and what follows it; the best first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planting:
    """A document with a fact inserted."""

    document: str
    spans: tuple[Span, ...]
    """The spans that were given, in characters of the new document."""
    fact: Fact
    sentences: tuple[str, ...]
    """What was inserted."""


def plant(
    document: str,
    spans: Sequence[Span],
    index: int,
    rng: random.Random,
    *,
    split: FactSplit = "train",
    kinds: Collection[str] | None = None,
) -> Planting | None:
    """Plants one fact in the chunk `spans[index]`; returns None if the chunk has no place for it.

    The document's own text is unchanged. The other spans hold the same text as before; the chunk's
    also holds the fact. The same arguments give the same fact.

    Args:
        document: any text.
        spans: [start, end) of chunks that do not overlap.
        index: which of them the fact goes to.
        rng: decides kind, names, wording and place.
        split: `train` or `test`: kinds, wordings and names of the two have nothing in common.
        kinds: names in `PLANTED_KINDS`, of that split; None = all of it that is not `hard`.
    """
    names = sorted(
        name
        for name, kind in PLANTED_KINDS.items()
        if kind.split == split and (not kind.hard if kinds is None else name in kinds)
    )
    made = _make_up(document, rng.choice(names), split, rng)
    if made is None:
        return None
    fact, sentences = made
    places = _places(document, spans[index], len(sentences), rng)
    if places is None:
        return None
    new_spans = list(spans)
    # From the end, so that the places before stay where they are.
    for sentence, (place, after) in sorted(
        zip(sentences, places, strict=True), key=lambda pair: pair[1], reverse=True
    ):
        text = sentence + after
        document = document[:place] + text + document[place:]
        new_spans = [
            (start + len(text) * (start >= place), end + len(text) * (end > place))
            for start, end in new_spans
        ]
    return Planting(document=document, spans=tuple(new_spans), fact=fact, sentences=sentences)


def _make_up(
    document: str, name: str, split: FactSplit, rng: random.Random
) -> tuple[Fact, tuple[str, ...]] | None:
    """Makes up a fact whose names and answer are not in the document, with its sentences."""
    kind = PLANTED_KINDS[name]
    wording = rng.choice(kind.statements)
    question = rng.choice(kind.questions)
    texts = "".join((*wording, question))
    used = {field for _, field, _, _ in string.Formatter().parse(texts) if field}
    lowered = document.lower()
    for _ in range(ATTEMPTS):
        fields = made_up_fields(rng, split)
        # Short words, such as one item of a list or a number, may well be there.
        distinct = {field for field in used if len(fields[field]) > 7 or field == "code"}
        if not any(fields[field].lower() in lowered for field in distinct):
            fact = Fact(
                kind=name,
                question=question.format(**fields),
                answer=tuple(fields[field] for field in kind.answer),
            )
            return fact, tuple(sentence.format(**fields) for sentence in wording)
    return None


def _places(
    document: str, span: Span, number: int, rng: random.Random
) -> list[tuple[int, str]] | None:
    """Chooses places inside a chunk, each with what follows the sentence inserted there.

    They are borders of paragraphs if there are enough, else of lines, sentences, words. Neither end
    of the chunk is one, so a chunk without white space inside has none.
    """
    start, end = span
    for border, after in _BORDERS:
        found = [
            match.end()
            for match in border.finditer(document, start, end)
            if match.start() > start and match.end() < end
        ]
        if len(found) >= number:
            return [(place, after) for place in rng.sample(found, number)]
    return None
