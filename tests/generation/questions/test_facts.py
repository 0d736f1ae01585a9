from __future__ import annotations

import random

from megatron_longpo.generation.questions.facts import FINDERS, choose_fact, find_facts, holds_fact

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
    only = choose_fact(PROSE, PROSE, random.Random(0), kinds=["section_content"])
    assert only is not None and only.kind == "section_content"


def test_answers_that_hold_a_fact() -> None:
    assert holds_fact("It is\n`Nine  to FIVE`.", ("nine to five",))
    assert not holds_fact("At nine.", ("nine", "five"))


def test_numbers_count_by_themselves() -> None:
    assert holds_fact("It weighs 37 kilograms, or **37**.", ("37",))
    assert holds_fact("In 37.", ("37",)) and holds_fact("37,5 or 37, 5", ("37",))
    for text in ("1837", "370", "37.5", "1,037", "0.37"):
        assert not holds_fact(f"It weighs {text} kilograms.", ("37",))
