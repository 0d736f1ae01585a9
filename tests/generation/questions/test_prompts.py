from __future__ import annotations

import random

import pytest

from megatron_longpo.generation.questions.prompts import (
    BETTER_REQUEST,
    PHRASINGS,
    SUPPORT_REQUEST,
    parse_questions,
    phrase,
    question_request,
)

FOUR = [
    "What does the ledger say about the barrels?",
    "How do tide and harbour depend on each other?",
    "Why was the salt sold inland?",
    "Who measured the depth, and with what?",
]


def test_phrasings() -> None:
    assert len(PHRASINGS) == len(set(PHRASINGS)) >= 20
    asked = {phrase("What {x}?", random.Random(seed)) for seed in range(300)}
    assert len(asked) == len(PHRASINGS)
    assert all("What {x}?" in question and "above" in question for question in asked)


def test_requests_fill_in() -> None:
    assert "4 questions" in question_request() and "2 questions" in question_request(2)
    assert "Q{x}" in SUPPORT_REQUEST.format(question="Q{x}", answer="A")
    assert "Answer B: two" in BETTER_REQUEST.format(question="Q", first="one", second="two")


def listed(mark: str) -> str:
    return "\n".join(f"{mark.replace('N', str(n))}{q}" for n, q in enumerate(FOUR, start=1))


SHAPES = {
    "dots": listed("N. "),
    "brackets": listed("N) "),
    "both brackets": listed("(N) "),
    "indented": listed("   N.  "),
    "no space": listed("N."),
    "bold numbers": listed("**N.** "),
    "bold dots outside": listed("**N**. ").replace("**1**.", "**1.**").replace("**", ""),
    "q": listed("QN: "),
    "q dot": listed("Q.N. ").replace("Q.", "Q"),
    "question": listed("Question N: "),
    "bold question": listed("**Question N:** "),
    "question dash": listed("Question N - "),
    "headings": listed("### Question N\n"),
    "numbered headings": listed("## N. "),
    "bullets": listed("- "),
    "stars": listed("* "),
    "dots as bullets": listed("\u2022 "),
    "bare lines": "\n".join(FOUR),
    "bare lines apart": "\n\n".join(FOUR),
    "introduction": "Sure! Here are four questions about the text:\n\n" + listed("N. "),
    "introduction and bullets": "Here are 4 questions:\n" + listed("- "),
    "conclusion": listed("N. ") + "\n\nThese questions need several parts of the text.",
    "conclusion at once": listed("N. ") + "\nI hope this helps!",
    "thinking": "<think>\n1. What first?\n2. Hm, what then?\n</think>\n" + listed("N. "),
    "thinking from the start": "I could ask:\n1. No, not this\n</think>\n" + listed("N. "),
    "fence": "```\n" + listed("N. ") + "\n```",
    "wrapped": listed("N. ").replace(" and ", " and\n   ").replace(" the ", "\nthe "),
    "blank lines": listed("N. ").replace("\n", "\n\n"),
    "quoted": "\n".join(f'{n}. "{q}"' for n, q in enumerate(FOUR, start=1)),
    "bold whole": "\n".join(f"{n}. **{q}**" for n, q in enumerate(FOUR, start=1)),
    "labels in items": listed("N. Question: "),
    "own answers": listed("N. ").replace("?\n", "?\n   Answer: None was paid for, see 2. above.\n"),
    "own answers in bold": listed("QN: ").replace("?\n", "?\n**A:** Twelve of them.\n\n"),
    "windows line ends": listed("N. ").replace("\n", "\r\n"),
    "asked again": listed("N. ") + "\n\n" + listed("Question N:\n"),
    "code afterwards": listed("N. ")
    + "\n\nHere is the code:\n```python\ndef f(x):\n    return x\n",
    "json": "[" + ", ".join(f'"{q}"' for q in FOUR) + "]",
    "fenced json": "```json\n[" + ",\n".join(f'"{q}"' for q in FOUR) + "]\n```",
    "json objects": "Here:\n[" + ", ".join(f'{{"id": 1, "question": "{q}"}}' for q in FOUR) + "]",
    "json object": '{"questions": [' + ", ".join(f'"{q}"' for q in FOUR) + "]}",
    "json by number": "{" + ", ".join(f'"q{n}": "{q}"' for n, q in enumerate(FOUR)) + "}",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_four_questions(shape: str) -> None:
    assert parse_questions(SHAPES[shape]) == FOUR


SOMETHING_ELSE = {
    "nothing": "",
    "one line": FOUR[0],
    "three": listed("N. ").rsplit("\n", 1)[0],
    "five": listed("N. ") + "\n5. And what else is there?",
    "too short": listed("N. ").replace(FOUR[3], "Why?"),
    "twice the same": listed("N. ").replace(FOUR[3], FOUR[0]),
    "numbers out of order": listed("N. ").replace("3. ", "9. "),
    "prose": "The text is about a harbour. It has a ledger, and barrels.\nIt is long.",
    "statements": listed("N. ").replace("?", "."),
    "the request": "Write 4 questions about the text. Each question must have one clear answer.",
    "broken json": '["What does the ledger say about the barrels?", "How do',
    "only thinking": "<think>\n" + listed("N. "),
    "endless": "1. What is " + "the most important thing, " * 60 + "here?",
}


@pytest.mark.parametrize("shape", SOMETHING_ELSE)
def test_other_numbers_of_questions_are_refused(shape: str) -> None:
    assert parse_questions(SOMETHING_ELSE[shape]) is None


def test_fewer_or_more_questions_may_be_allowed() -> None:
    assert parse_questions(SOMETHING_ELSE["three"], least=2) == FOUR[:3]
    assert parse_questions(SOMETHING_ELSE["three"], least=4) is None
    assert parse_questions(SOMETHING_ELSE["five"], least=1) == FOUR
    assert parse_questions(SOMETHING_ELSE["twice the same"], least=3) == FOUR[:3]
    assert parse_questions(SOMETHING_ELSE["one line"], least=1) == FOUR[:1]


def test_numbers_inside_a_question_are_no_items() -> None:
    text = listed("N. ").replace("barrels?", "barrels of\n1843. How many were there?")
    questions = parse_questions(text)
    assert questions is not None
    assert (
        questions[0] == "What does the ledger say about the barrels of 1843. How many were there?"
    )
    version = listed("N. ").replace(FOUR[1], "What changed between\n2.0 and 3.1 of the program?")
    questions = parse_questions(version)
    assert questions is not None
    assert questions[1] == "What changed between 2.0 and 3.1 of the program?"


def test_tasks_and_other_scripts_are_questions_too() -> None:
    tasks = ["Explain how tides work here.", "Compare salt and barrels.", "Name all the farmers."]
    last = "这本账簿上写着什么\uff1f"
    text = "\n".join(f"{n}. {q}" for n, q in enumerate([*tasks, last], start=1))
    assert parse_questions(text) == [*tasks, last]
