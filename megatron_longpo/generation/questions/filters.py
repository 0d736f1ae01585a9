"""Filters: answers that are not worth training on. Drops are counted by a filter's name."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection
from typing import Any

from megatron_longpo.config.names import DEFAULT_FILTERS, FilterName
from megatron_longpo.generation.documents.near_duplicates import SPACELESS

REFUSALS = (
    "i cannot answer",
    "i can't answer",
    "i am unable to",
    "i'm unable to",
    "i am not able to",
    "i'm not able to",
    "i cannot provide",
    "i can't provide",
    "i cannot help",
    "i can't help",
    "i cannot assist",
    "i can't assist",
    "i cannot determine",
    "i can't determine",
    "i cannot access",
    "i don't have access",
    "i do not have access",
    "i don't have enough",
    "i do not have enough",
    "i don't have the text",
    "i do not have the text",
    "i don't know",
    "i do not know",
    "i'm sorry",
    "i am sorry",
    "i apologize",
    "i apologise",
    "as an ai",
    "as a language model",
    "as an artificial intelligence",
    "it is impossible to answer",
    "it is not possible to answer",
    "no information is given",
    "no information is provided",
    "could you please provide",
    "please provide the text",
    "please provide more",
)
"""Openings of an answer that answers nothing, in lower case."""

REFUSAL_CHARS = 160
"""A refusal opens an answer; later such words may belong to the subject."""

MOST_REPEATED = {"chosen": 0.90, "rejected": 0.95}
"""Largest share of words that occurred before in the answer."""

LOOP_WORDS = 4
MOST_LOOPING = 0.5
"""Largest share of runs of LOOP_WORDS words that occurred before in an answer. An answer that says
all twice is below, one that says all three times is above; prose of any length is far below."""

LEAST_WORDS = 2

LEAST_LETTERS = 20
"""The language of a shorter text is unknown."""

LANGUAGE_CONFIDENCE = 0.8
"""Least probability at which a text's language counts as known."""

_WORD = re.compile(r"\w*[^\W\d_]\w*")
_SPACED = re.compile(rf"[{SPACELESS}]|[^\s{SPACELESS}]+")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_THINKING = re.compile(r"</?(?:think|thinking|thought|reasoning)>|\[/?THINK\]")


class Filters:
    """Applies the filters that are on."""

    def __init__(self, names: Collection[FilterName] = DEFAULT_FILTERS) -> None:
        self.names = frozenset(names)

    def fault(
        self, answer: str, branch: str, *, finished: bool, question: str, context: str
    ) -> str | None:
        """Returns why an answer is dropped, such as `chosen answer: refusal`, or None.

        Args:
            answer: what the model wrote.
            branch: `chosen` or `rejected`.
            finished: whether the model ended it by itself.
            question: what was asked, without the words that tie it to a text.
            context: the chunk asked about; the answer may be in its language too.
        """
        checks: dict[FilterName, Callable[[], bool]] = {
            "empty": lambda: not answer.strip(),
            "wordless": lambda: len(_words(answer)) < LEAST_WORDS,
            "refusal": lambda: is_refusal(answer),
            "repetition": lambda: repeated_ratio(_words(answer)) > MOST_REPEATED[branch],
            "thinking": lambda: _THINKING.search(answer) is not None,
            "language": lambda: other_language(answer, question, context),
            "loop": lambda: is_loop(answer),
            "unfinished": lambda: not finished,
        }
        for name, fails in checks.items():
            if (name in self.names or f"{branch}_{name}" in self.names) and fails():
                return f"{branch} answer: {name}"
        return None

    def pair_fault(self, chosen: str, rejected: str) -> str | None:
        """Returns why two answers are no pair, or None."""
        if "same" in self.names and same_answer(chosen, rejected):
            return "rejected answer: same"
        return None


def is_refusal(answer: str) -> bool:
    opening = answer[:REFUSAL_CHARS].lower().replace("\u2019", "'")
    return any(refusal in opening for refusal in REFUSALS)


def repeated_ratio(words: list[str]) -> float:
    """Returns the share of words that occurred before: 0 if all differ, near 1 for one word."""
    return 1 - len(set(words)) / len(words) if words else 0.0


def is_loop(answer: str) -> bool:
    """Returns whether most of an answer repeats earlier parts word by word; marks count too."""
    words = _SPACED.findall(answer.lower())
    runs = list(zip(*(words[start:] for start in range(LOOP_WORDS)), strict=False))
    return bool(runs) and 1 - len(set(runs)) / len(runs) > MOST_LOOPING


def same_answer(chosen: str, rejected: str) -> bool:
    """Returns whether two answers differ only in spacing and letter case."""
    return chosen.lower().split() == rejected.lower().split()


def other_language(answer: str, question: str, context: str) -> bool:
    """Returns whether an answer is in another language than both its question and its text.

    False if one of the languages is unknown, as in code and in short texts.
    """
    spoken = language(answer)
    if spoken is None:
        return False
    asked = language(question)
    # A template may ask in English about a German text, and a quotation answers it in German.
    return asked is not None and spoken not in (asked, language(context[:2000]))


def language(text: str) -> str | None:
    """Returns the ISO 639-1 code of a text's language, without code in it; None if unknown."""
    prose = _CODE.sub(" ", text)
    if sum(character.isalpha() for character in prose) < LEAST_LETTERS:
        return None
    name, confidence = _identifier().classify(prose)
    return name if confidence >= LANGUAGE_CONFIDENCE else None


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
