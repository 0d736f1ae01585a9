"""Reads a judge's reply: a score of 1 to 5, or which of two answers is better."""

from __future__ import annotations

import re

from megatron_longpo.generation.questions.prompts import without_thinking

_SCALE = re.compile(
    r"\b(?:of|from|between)?\s*\(?(?:1|one)\s*(?:-|\u2013|to|and)\s*(?:5|five)\b\)?"
    r"|\s*(?:/|out\s+of|of)\s*(?:5|five)\b",
    re.IGNORECASE,
)
"""The scale itself, which a judge repeats: `1 to 5`, `/5`, `out of 5`."""
_WORDS = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_SCORE = re.compile(
    r"(?<![\d.])([1-5])(?:\.\d+)?(?![\d%])|\b(one|two|three|four|five)\b", re.IGNORECASE
)
_LABELLED_SCORE = re.compile(
    r"(?:score|rating|rate|number|support|verdict)\w*[\W_]{0,6}(?:is|be|it|of|as|at|this|a|with|[\W_])*"
    r"([1-5])(?![\d%])",
    re.IGNORECASE,
)

_LABELLED_LETTER = re.compile(
    r"(?:answer|better|best|letter|choice|choose|verdict|prefer|winner)\w*[\W_]{0,6}"
    r"(?:(?i:is|one|answer|to|be)[\W_]+)*([ABC])(?![\w'])"
)
_LETTER = re.compile(
    r"(?<![\w'])(?:([BC])(?![\w'])|(A)(?![\w'])(?!\s+(?!is\b|has\b|was\b|gives\b)[a-z]))"
)
_NEITHER = re.compile(r"\b(?:neither|tie|both|equal(?:ly)?|same)\b", re.IGNORECASE)


def read_score(text: str) -> int | None:
    """Reads the score from 1 to 5 in a judge's reply; None if it gives none or several."""
    text = _SCALE.sub(" ", without_thinking(text))
    if labelled := _LABELLED_SCORE.search(text):
        return int(labelled.group(1))
    found = {_WORDS.get(word.lower(), digit) for digit, word in _SCORE.findall(text)}
    return int(found.pop()) if len(found) == 1 else None


def read_preference(text: str) -> float | None:
    """Reads 1 for answer A, 0 for B, 0.5 for neither; None if the reply does not tell."""
    text = without_thinking(text)
    values = {"A": 1.0, "B": 0.0, "C": 0.5}
    bare = re.sub(r"[\W_]", "", text)
    if bare.upper() in values:
        return values[bare.upper()]
    if labelled := _LABELLED_LETTER.search(text):
        return values[labelled.group(1)]
    letters = {first or second for first, second in _LETTER.findall(text)}
    if len(letters) == 1:
        return values[letters.pop()]
    if _NEITHER.search(text):
        return 0.5
    # `A is better than B`: what stands before the word.
    if found := re.search(r"\b([AB])\b[^.]{0,20}\bbetter\b", text):
        return values[found.group(1)]
    return None
