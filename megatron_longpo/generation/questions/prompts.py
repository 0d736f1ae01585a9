"""All texts that a model is given besides documents, and the questions read from what it writes."""

from __future__ import annotations

import json
import random
import re

PHRASINGS = (
    "{question}\nAnswer from the text above.",
    "{question} Base your answer on the text above.",
    "{question} Keep to what the text above says.",
    "{question} Take the answer from the text above.",
    "Going by the text above: {question}",
    "According to the text above: {question}",
    "As described in the text above: {question}",
    "With the text above in mind: {question}",
    "From what is written above: {question}",
    "Given the text above: {question}",
    "Having read the text above: {question}",
    "Question about the text above: {question}",
    "Here is a question about the text above. {question}",
    "Read the text above and answer: {question}",
    "Answer from the text above: {question}",
    "Answer this question from the text above: {question}",
    "Please answer from the text above: {question}",
    "Based on the text above, answer the question: {question}",
    "Use the text above to answer this question: {question}",
    "Find the answer in the text above: {question}",
)
"""Ways to tie a question to the text before it.

Of 49 tried on SmolLM2-135M with planted facts in 14 chunks of prose of 700 to 1,400 tokens, these
were among the best: each had 71 to 86 % right. Those with a sentence about the answer after the
question ("The answer is in the text above.") had 43 to 64 %: the model continues that sentence."""

NUM_QUESTIONS = 4

QUESTION_REQUEST = (
    "Write {number} questions about the text above, numbered 1 to {number}, one on each line. "
    "Each must connect several parts of the text, need more than copying a sentence, and have one "
    "clear answer that the text gives. Write the questions only."
)
"""What the model is asked for after a chunk if it writes the questions itself."""

SUPPORT_REQUEST = (
    "A question about the text above and an answer to it follow.\n\n"
    "Question: {question}\n\nAnswer: {answer}\n\n"
    "How well does the text above support the answer? Reply with one number: 1 = the text "
    "contradicts it or says nothing of it, 2 = little of it is there, 3 = about half, 4 = most, "
    "5 = the text says all of it and it answers the question. Reply with the number only."
)
"""What a judge is asked after a chunk; see judge/run.py."""

BETTER_REQUEST = (
    "A question about the text above and two answers to it follow.\n\n"
    "Question: {question}\n\nAnswer A: {first}\n\nAnswer B: {second}\n\n"
    "Which answer is right, complete and supported by the text above? Reply with one letter: A, B, "
    "or C where neither is better. Reply with the letter only."
)
"""The same for a pair of answers, asked in both orders."""

LEAST_QUESTION_WORDS = 3

MOST_QUESTION_CHARS = 1000

_QUESTION_MARKS = "?\uff1f\u061f\u037e"
_ASKING_VERBS = frozenset(
    {
        *("analyse", "analyze", "assess", "compare", "contrast", "define", "describe"),
        *("determine", "discuss", "evaluate", "examine", "explain", "find", "give"),
        *("identify", "illustrate", "list", "name", "outline", "provide", "quote"),
        *("show", "specify", "state", "summarise", "summarize", "tell", "trace"),
        *("using", "based", "according"),
    }
)

_THINKING = re.compile(
    r"<(think|thinking|thought|reasoning)>.*?(?:</\1>|\Z)|\A.*?</think>", re.DOTALL
)
_FENCE = re.compile(r"^[ \t]*```[^\n]*$", re.MULTILINE)
_ITEM = re.compile(
    r"""^[ \t>]*(?:\#{1,6}[ \t]*)?(?:\*\*|__)?[ \t]*          # quotation, heading, emphasis
    (?:(?:question|q)[ \t]*(?:no\.?|number|\#)?[ \t]*         # Question 1:  Q1.  Q#1 -
          (?P<named>\d{1,2})(?:[ \t]*[.:)\]\u2013\u2014-]+|(?=\*\*|__|[ \t]*\n))
      |[(\[]?(?P<number>\d{1,2})[ \t]*[.:)\]]+(?!\d)          # 1.  1)  (1)  [1]  1:
      |(?P<bullet>[-*+\u2022\u2013](?=[ \t])))                # - * + and the like
    (?:\*\*|__)?[ \t]*""",
    re.MULTILINE | re.IGNORECASE | re.VERBOSE,
)
"""The mark that opens an item: `1.`, `2)`, `(3)`, `**4.**`, `Q1:`, `Question 2 -`, `- `."""
_LABEL = re.compile(
    r"^(?:\*\*|__)?(?:question|q)[ \t]*\d*[ \t]*[:.\-][ \t]*(?:\*\*|__)?[ \t]*", re.IGNORECASE
)
_ANSWER = re.compile(
    r"^[ \t>*_\-]*(?:answer|a|explanation|reason|note)[ \t]*\d*[ \t]*[*_]*:", re.IGNORECASE
)
_QUOTES = {'"': '"', "\u201c": "\u201d", "'": "'", "\u00ab": "\u00bb", "*": "*", "_": "_"}


def phrase(question: str, rng: random.Random) -> str:
    """Ties a question to the text above it in one of `PHRASINGS`."""
    return rng.choice(PHRASINGS).replace("{question}", question)


def question_request(number: int = NUM_QUESTIONS) -> str:
    return QUESTION_REQUEST.format(number=number)


def parse_questions(
    text: str, *, expected: int = NUM_QUESTIONS, least: int | None = None
) -> list[str] | None:
    """Reads the questions that a model wrote; returns None if they are not as many as asked for.

    Accepted are JSON lists, lists with numbers, `Q1:` or bullets, and bare lines that end with a
    question mark. Thinking, introductions, headings and answers are skipped, and a question may
    have several lines.

    Args:
        text: what the model wrote.
        expected: how many were asked for. The paper drops any other number.
        least: fewest that are accepted, if fewer than `expected` are; of more, take the first.
    """
    text = _FENCE.sub("", without_thinking(text)).strip()
    questions = _json_questions(text) or _listed_questions(text) or _line_questions(text)
    good = list(dict.fromkeys(q for q in questions if is_question(q)))
    if least is not None:
        return good[:expected] if len(good) >= least else None
    # One that is none, or two that are the same, make another number of questions.
    return good if len(good) == len(questions) == expected else None


def without_thinking(text: str) -> str:
    """Removes thinking between tags, or up to the tag that ends it, from what a model wrote."""
    return _THINKING.sub("", text).strip()


def is_question(text: str) -> bool:
    """Returns whether a text asks something, by its question mark or verb and by its length."""
    first = re.match(r"\W*(\w+)", text)
    asks = any(mark in text for mark in _QUESTION_MARKS) or (
        first is not None and first.group(1).lower() in _ASKING_VERBS
    )
    # Scripts without spaces have one word a sentence.
    long_enough = len(text.split()) >= LEAST_QUESTION_WORDS or not text.isascii()
    return asks and long_enough and len(text) <= MOST_QUESTION_CHARS


def _json_questions(text: str) -> list[str]:
    """Reads a JSON list of texts or objects, or an object that holds one."""
    start = min((i for i in (text.find("["), text.find("{")) if i >= 0), default=-1)
    if start < 0 or text[:start].count("\n") > 3:
        return []
    try:
        value, _ = json.JSONDecoder().raw_decode(text[start:])
    except ValueError:
        return []
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        value = lists[0] if lists else list(value.values())
    if not isinstance(value, list):
        return []
    found = []
    for item in value:
        if isinstance(item, dict):
            item = item.get("question", item.get("text"))
        if isinstance(item, str):
            found.append(_tidy(item))
    return found


def _listed_questions(text: str) -> list[str]:
    """Reads items with numbers, else with bullets; numbers count only if they run 1, 2, 3 ..."""
    marks = list(_ITEM.finditer(text))
    numbered = [mark for mark in marks if mark["bullet"] is None]
    run = _run_of_numbers(numbered)
    marks = run if run else [mark for mark in marks if mark["bullet"] is not None]
    ends = [*(mark.start() for mark in marks), len(text)][1:]
    bodies = [_body(text[mark.end() : end]) for mark, end in zip(marks, ends, strict=True)]
    return [body for body in bodies if body]


def _run_of_numbers(marks: list[re.Match[str]]) -> list[re.Match[str]]:
    """Returns the first items numbered 1, 2, 3 ...; any other number is part of a question."""
    run: list[re.Match[str]] = []
    for mark in marks:
        if int(mark["number"] or mark["named"]) == len(run) + 1:
            run.append(mark)
    return run


def _body(text: str) -> str:
    """Returns an item's question: its lines up to a blank one, an answer or a question mark."""
    lines: list[str] = []
    for line in text.strip("\n").split("\n"):
        if _ANSWER.match(line) or (
            lines and (not line.strip() or lines[-1].endswith(tuple(_QUESTION_MARKS)))
        ):
            break
        if line.strip():
            lines.append(line.strip())
    return _tidy(" ".join(lines))


def _line_questions(text: str) -> list[str]:
    """Reads lines that end with a question mark."""
    return [
        _tidy(line)
        for line in text.splitlines()
        if re.search(r"[?\uff1f\u061f][\"'*_\u201d)]*\s*$", line)
    ]


def _tidy(text: str) -> str:
    """Removes labels, emphasis and quotation marks around the whole."""
    text = _LABEL.sub("", " ".join(text.split()))
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text.replace("**", "").strip()
