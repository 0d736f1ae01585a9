"""Which answers are not worth training on."""

from __future__ import annotations

import re

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
"""A refusal opens an answer; further on, such words may belong to the subject."""

MOST_REPEATED = {"chosen": 0.90, "rejected": 0.95}
"""Largest share of words that occurred before in the answer."""

LEAST_WORDS = 2

_WORD = re.compile(r"\w*[^\W\d_]\w*")


def fault(answer: str, branch: str) -> str | None:
    """Why an answer of `chosen` or `rejected` is dropped, or None where it is good."""
    words = _WORD.findall(answer.lower())
    if not answer.strip():
        return f"empty {branch} answer"
    if len(words) < LEAST_WORDS:
        return f"{branch} answer without words"
    opening = answer[:REFUSAL_CHARS].lower().replace("\u2019", "'")
    if any(refusal in opening for refusal in REFUSALS):
        return f"{branch} answer a refusal"
    if repeated_ratio(words) > MOST_REPEATED[branch]:
        return f"{branch} answer repeats itself"
    return None


def repeated_ratio(words: list[str]) -> float:
    """The share of words that occurred before: 0 for all different, near 1 for one word over."""
    return 1 - len(set(words)) / len(words)


def same_answer(chosen: str, rejected: str) -> bool:
    """Whether two answers differ in nothing but spacing and letter case: no preference in them."""
    return chosen.lower().split() == rejected.lower().split()
