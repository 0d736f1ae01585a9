"""Finds facts in a chunk without a model, each with the question that asks for it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

Found = tuple[str, str, tuple[str, ...]]
"""(text that names the fact and must be unique in the document, question, words of the answer)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """A question with one answer, which is in the chunk and nowhere else in the document."""

    kind: str
    question: str
    answer: tuple[str, ...]
    """Words that a right answer holds, all of them; empty if words do not decide."""


def find_facts(chunk: str, document: str) -> list[Fact]:
    """Finds all facts of a chunk whose name occurs once in the document, in the order of kinds."""
    facts = []
    for kind, finder in FINDERS.items():
        for name, question, answer in finder(chunk):
            if document.count(name) == 1:
                facts.append(Fact(kind=kind, question=question, answer=answer))
    return facts


def choose_fact(
    chunk: str,
    document: str,
    rng: random.Random,
    *,
    checkable: bool = False,
    kinds: Collection[str] | None = None,
) -> Fact | None:
    """Chooses a fact of the chunk: first a kind at random, so that frequent kinds do not prevail.

    `checkable` leaves out facts whose answer is not decided by its words; `kinds` are names in
    `FINDERS`, None = all.
    """
    facts = [
        fact
        for fact in find_facts(chunk, document)
        if (fact.answer or not checkable) and (kinds is None or fact.kind in kinds)
    ]
    if not facts:
        return None
    kind = rng.choice(sorted({fact.kind for fact in facts}))
    return rng.choice([fact for fact in facts if fact.kind == kind])


def holds_fact(text: str, answer: tuple[str, ...]) -> bool:
    """Returns whether a text holds every word of the answer, whatever the letter case and spacing.

    A number counts only as a whole: 37 is not in 1837, nor in 37.5.
    """
    return all(re.search(_pattern(word), text, re.IGNORECASE) for word in answer)


def _pattern(word: str) -> str:
    marks = "".join(word.split())
    before = r"(?<!\d)(?<!\d[.,])" if marks[:1].isdigit() else ""
    after = r"(?!\d)(?![.,]\d)" if marks[-1:].isdigit() else ""
    return before + r"\s*".join(map(re.escape, marks)) + after


# ---------------------------------------------------------------- Python

_FUNCTION = re.compile(r"^[ \t]*def ((?!__)[a-z_]\w*)\(([^()]*)\)[^\n]*:", re.MULTILINE)
_DOCSTRING = re.compile(
    r'^[ \t]*def ((?!__)[a-z_]\w*)\([^()]*\)[^\n]*:\n\s+r?"""([A-Z][^"\n]{15,120})', re.MULTILINE
)
_CLASS = re.compile(r"^class (\w+)\(([A-Za-z_][\w.]*)\):", re.MULTILINE)
_CONSTANT = re.compile(
    r"^([A-Z_][A-Z0-9_]{3,}) *= *(-?\d[\w.]*|'[^'\n\\]{1,40}'|\"[^\"\n\\]{1,40}\")[ \t]*$",
    re.MULTILINE,
)


def _parameters(text: str) -> list[tuple[str, str | None]]:
    """Returns (name, default) of each parameter; nothing if the list is not a plain one."""
    parameters = []
    for part in text.rstrip().removesuffix(",").split(","):
        if part.strip() in ("*", "/"):
            continue
        found = re.fullmatch(r"\s*\*{0,2}(\w+)\s*(?::[^=]+)?(?:=\s*(\S.*?))?\s*", part, re.DOTALL)
        if found is None:
            return []
        if found.group(1) not in ("self", "cls"):
            parameters.append((found.group(1), found.group(2)))
    return parameters


def _function_parameters(chunk: str) -> Iterator[Found]:
    for found in _FUNCTION.finditer(chunk):
        names = tuple(name for name, _ in _parameters(found.group(2)))
        if 2 <= len(names) <= 5 and "\n" not in found.group(2):
            yield (
                f"def {found.group(1)}(",
                f"Copy the line that begins with `def {found.group(1)}(`.",
                names,
            )


def _parameter_defaults(chunk: str) -> Iterator[Found]:
    for found in _FUNCTION.finditer(chunk):
        for name, default in _parameters(found.group(2)):
            if default is not None and re.fullmatch(r"-?\d+|'[^']+'|\"[^\"]+\"|True", default):
                yield (
                    f"def {found.group(1)}(",
                    f"What is the default value of the parameter `{name}` of the function "
                    f"`{found.group(1)}`?",
                    (default.strip("'\""),),
                )


def _function_purpose(chunk: str) -> Iterator[Found]:
    for found in _DOCSTRING.finditer(chunk):
        words = sorted(re.findall(r"[a-z]{5,}", found.group(2).lower()), key=len)
        yield (
            f"def {found.group(1)}(",
            f"Which sentence describes the function `{found.group(1)}`? Quote it.",
            tuple(words[-2:]),
        )


def _class_base(chunk: str) -> Iterator[Found]:
    for found in _CLASS.finditer(chunk):
        yield (
            f"class {found.group(1)}(",
            f"Which class does the class `{found.group(1)}` inherit from?",
            (found.group(2),),
        )


def _constant_value(chunk: str) -> Iterator[Found]:
    for found in _CONSTANT.finditer(chunk):
        yield (
            f"\n{found.group(1)} ",
            f"What value is assigned to `{found.group(1)}`?",
            (found.group(2).strip("'\""),),
        )


# ---------------------------------------------------------------- prose

_MARKDOWN_HEADING = re.compile(
    r"^#{1,6} ([A-Z][^\n#`]{4,60}[^\s.:,;#])[ \t]*\n\s*\n?", re.MULTILINE
)
_UNDERLINED_HEADING = re.compile(
    r"^([A-Z][^\n]{3,59}[^\s.:,;])\n([=~^*-])\2{3,}[ \t]*$", re.MULTILINE
)
_KEY_VALUE = re.compile(r"^[ \t*-]*([A-Z][A-Za-z -]{2,30}): +(\S[^\n:]{2,60})$", re.MULTILINE)
_SENTENCE = re.compile(r"(?:(?<=[.!?]\s)|(?<=\n\n))[A-Z][^.!?]{30,160}[.!?](?=\s)")
_NUMBER = re.compile(r"(?<![\w.,-])\d{2,}(?:[.,]\d+)*(?![\w.,-]*\w)")
_CODE_LINE = re.compile(r"^(?:def|class|import|from|#!)\b", re.MULTILINE)


def _section_content(chunk: str) -> Iterator[Found]:
    found_headings = list(_UNDERLINED_HEADING.finditer(chunk))
    if not _CODE_LINE.search(chunk):  # there, `# ` begins a comment
        found_headings += list(_MARKDOWN_HEADING.finditer(chunk))
    for found in found_headings:
        title = found.group(1).strip()
        yield found.group(0), f'What does the section "{title}" say?', ()


def _key_value(chunk: str) -> Iterator[Found]:
    if _CODE_LINE.search(chunk):
        return
    for found in _KEY_VALUE.finditer(chunk):
        key, value = found.group(1).strip(), found.group(2).strip()
        yield f"{found.group(1)}:", f'What is stated for "{key}"?', (value.rstrip("."),)


def _missing_number(chunk: str) -> Iterator[Found]:
    for found in _SENTENCE.finditer(chunk):
        sentence = " ".join(found.group(0).split())
        numbers = _NUMBER.findall(sentence)
        if len(numbers) == 1 and len(re.findall(r"\d[\d.,]*", sentence)) == 1:
            gapped = sentence.replace(numbers[0], "____", 1)
            yield (
                found.group(0),
                f'Which number is missing in the sentence "{gapped}"?',
                (numbers[0],),
            )


FINDERS: dict[str, Callable[[str], Iterator[Found]]] = {
    "function_parameters": _function_parameters,
    "parameter_default": _parameter_defaults,
    "function_purpose": _function_purpose,
    "class_base": _class_base,
    "constant_value": _constant_value,
    "section_content": _section_content,
    "key_value": _key_value,
    "missing_number": _missing_number,
}
