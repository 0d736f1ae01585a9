"""Instructions: where the questions of an example come from, and how they are put."""

from __future__ import annotations

import random
import re
from pathlib import Path

from megatron_longpo.errors import UserError
from megatron_longpo.generation.facts import Fact, find_facts

PHRASINGS = (
    "{question} Answer as the text above describes it.",
    "{question} Answer from the text above.",
    "{question} Base your answer on the text above.",
    "{question} Keep to what the text above says.",
    "{question} The answer is in the text above.",
    "{question} Use only the text above.",
    "{question} Refer to the text above.",
    "{question} Rely on the text given above.",
    "{question} Answer with what you have read above.",
    "{question} Look it up in the text above.",
    "Going by the text above: {question}",
    "According to the text above: {question}",
    "As described in the text above: {question}",
    "With the text above in mind: {question}",
    "From what is written above: {question}",
    "A question about the text above: {question}",
    "Judging by the text above: {question}",
    "Given the text above: {question}",
    "Having read the text above: {question}",
    "The text above answers this question: {question}",
)
"""Ways to tie a question to the text before it."""

NUM_QUESTIONS = 4

QUESTION_REQUEST = (
    "Write {number} questions about the text above, numbered 1 to {number}, one on each line. "
    "Each must connect several parts of the text, need more than copying a sentence, and have one "
    "clear answer that the text gives. Write the questions only."
)
"""What the model is asked for after a chunk where it writes the questions itself."""

_NUMBERED = re.compile(r"^\s*(?:\*\*)?(\d+)[.):](?:\*\*)?\s+(\S.*?)\s*$", re.MULTILINE)


def phrase(question: str, rng: random.Random) -> str:
    """The question tied to the text above it in one of `PHRASINGS`."""
    return rng.choice(PHRASINGS).format(question=question)


def question_request() -> str:
    return QUESTION_REQUEST.format(number=NUM_QUESTIONS)


def parse_questions(text: str) -> list[str] | None:
    """The questions of a numbered list, or None unless they are exactly 1 to `NUM_QUESTIONS`."""
    found = _NUMBERED.findall(text)
    if [int(number) for number, _ in found] != list(range(1, NUM_QUESTIONS + 1)):
        return None
    questions = [question.strip("* ") for _, question in found]
    return questions if all(len(question.split()) >= 3 for question in questions) else None


def choose_fact(
    chunk: str, document: str, rng: random.Random, *, checkable: bool = False
) -> Fact | None:
    """One fact of the chunk: a kind at random first, so that frequent kinds do not crowd out.

    `checkable` leaves out facts whose answer cannot be told by its words.
    """
    facts = [fact for fact in find_facts(chunk, document) if fact.answer or not checkable]
    if not facts:
        return None
    kind = rng.choice(sorted({fact.kind for fact in facts}))
    return rng.choice([fact for fact in facts if fact.kind == kind])


def read_instructions(path: str) -> list[str]:
    """The instructions of a text file, one a line."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"instructions ({path}): neither model nor template, and not a readable file ({error})"
        ) from error
    instructions = [line.strip() for line in lines if line.strip()]
    if not instructions:
        raise UserError(f"instructions ({path}): holds no instruction; write one a line")
    return instructions
