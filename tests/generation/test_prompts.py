from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron_longpo.errors import UserError
from megatron_longpo.generation.facts import FINDERS, find_facts, holds_fact
from megatron_longpo.generation.filters import MOST_REPEATED, fault, same_answer
from megatron_longpo.generation.prompts import (
    PHRASINGS,
    choose_fact,
    parse_questions,
    phrase,
    read_instructions,
)

CODE = '''
LIMIT_BYTES = 4096

class Reader(base.Stream):
    def fill(self, size, unit='kib', *rest):
        """Read more bytes until the buffer is full."""

    def seek(
        self,
        offset: int = 0,
        whence=None,
    ):
        pass

    def __init__(self, a, b):
        pass
'''
PROSE = """# The harbour

A town lies there. It was founded in 1843 by twelve men who sold salt to the inland farmers.
The mayor had 2 dogs and 14 cats, of which nobody knows the names any more today.

Opening hours: nine to five.

Fishing rights
==============
None.
"""


def by_kind(chunk: str, document: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {fact.kind: (fact.question, fact.answer) for fact in find_facts(chunk, document)}


def test_facts_of_code() -> None:
    facts = by_kind(CODE, CODE)
    assert facts["constant_value"][1] == ("4096",)
    assert "`LIMIT_BYTES`" in facts["constant_value"][0]
    assert facts["class_base"][1] == ("base.Stream",)
    assert facts["function_purpose"][1] == ("bytes", "until", "buffer")[-2:]
    assert facts["function_parameters"] == (
        "Copy the line that begins with `def fill(`.",
        ("size", "unit", "rest"),
    )
    assert facts["parameter_default"] == (
        "What is the default value of the parameter `offset` of the function `seek`?",
        ("0",),
    )
    assert not any("__init__" in question for question, _ in facts.values())


def test_facts_of_prose() -> None:
    facts = by_kind(PROSE, PROSE)
    question, answer = facts["missing_number"]
    assert answer == ("1843",)
    assert "It was founded in ____ by twelve men" in question
    assert facts["key_value"] == ('What is stated for "Opening hours"?', ("nine to five",))
    titles = {fact.question for fact in find_facts(PROSE, PROSE) if fact.kind == "section_content"}
    assert titles == {
        'What does the section "The harbour" say?',
        'What does the section "Fishing rights" say?',
    }


def test_every_kind_of_fact_is_tested() -> None:
    assert set(by_kind(CODE, CODE)) | set(by_kind(PROSE, PROSE)) == set(FINDERS)


def test_a_name_that_occurs_twice_is_no_fact() -> None:
    document = CODE + "\n\ndef fill(elsewhere, too):\n    pass\n"
    assert "function_parameters" in by_kind(CODE, CODE)
    assert "function_parameters" not in by_kind(CODE, document)


def test_choice_of_a_fact() -> None:
    assert choose_fact("Nothing here.", "Nothing here.", random.Random(0)) is None
    kinds = {
        fact.kind
        for seed in range(60)
        if (fact := choose_fact(PROSE, PROSE, random.Random(seed), checkable=True))
    }
    assert kinds == {"missing_number", "key_value"}


def test_answers_that_hold_a_fact() -> None:
    assert holds_fact("It is\n`Nine  to FIVE`.", ("nine to five",))
    assert not holds_fact("At nine.", ("nine", "five"))


def test_phrasings() -> None:
    assert len(PHRASINGS) == len(set(PHRASINGS)) >= 20
    asked = {phrase("What {x}?", random.Random(seed)) for seed in range(300)}
    assert len(asked) == len(PHRASINGS)
    assert all("What {x}?" in question and "above" in question for question in asked)


@pytest.mark.parametrize(
    "text",
    [
        "1. What is a?\n2. What is b?\n3. What is c?\n4. What is d?",
        "Here:\n\n1) What is a?\n\n 2) What is b?\n3) What is c?\n4) What is d?\n",
        "**1.** What is a?\n**2.** What is b?\n**3.** What is c?\n**4.** What is d?",
    ],
)
def test_numbered_questions(text: str) -> None:
    assert parse_questions(text) == ["What is a?", "What is b?", "What is c?", "What is d?"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What is a?",
        "1. What is a?\n2. What is b?\n3. What is c?",
        "1. What is a?\n2. What is b?\n3. What is c?\n4. Why?",
        "1. What is a?\n2. What is b?\n4. What is c?\n3. What is d?",
        "\n".join(f"{n}. What is it?" for n in range(1, 6)),
    ],
)
def test_other_lists_of_questions_are_refused(text: str) -> None:
    assert parse_questions(text) is None


def test_instruction_file(tmp_path: Path) -> None:
    path = tmp_path / "questions.txt"
    path.write_text("Sum up.\n\n What is new?\n")
    assert read_instructions(str(path)) == ["Sum up.", "What is new?"]
    path.write_text("\n")
    with pytest.raises(UserError, match=r"instructions \(.*\): holds no instruction"):
        read_instructions(str(path))
    with pytest.raises(UserError, match=r"instructions \(modle\): neither model nor template"):
        read_instructions("modle")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("It was founded in 1843.", None),
        (" ", "empty {} answer"),
        ("42.", "{} answer without words"),
        ("Yes.", "{} answer without words"),
        ("I\u2019m sorry, but that is not given.", "{} answer a refusal"),
        ("The letter of 1843 ends so: " + "and he went on " * 12 + "I am sorry, he wrote.", None),
        ("no " * 100, "{} answer repeats itself"),
    ],
)
@pytest.mark.parametrize("branch", ["chosen", "rejected"])
def test_filters(answer: str, reason: str | None, branch: str) -> None:
    assert fault(answer, branch) == (reason and reason.format(branch))


def test_rejected_answers_may_repeat_more() -> None:
    text = "one two three four " * 15  # 60 words, 4 different: 0.933 repeated
    assert MOST_REPEATED["chosen"] < 1 - 4 / 60 < MOST_REPEATED["rejected"]
    assert fault(text, "chosen") == "chosen answer repeats itself"
    assert fault(text, "rejected") is None


def test_same_answer() -> None:
    assert same_answer("It is\nseven.", "it is seven.")
    assert not same_answer("It is seven.", "It is seven!")
