from __future__ import annotations

from typing import get_args

import pytest

from megatron_longpo.config.names import DEFAULT_FILTERS, FilterName
from megatron_longpo.generation.questions.filters import (
    MOST_REPEATED,
    Filters,
    is_loop,
    language,
    other_language,
    same_answer,
)

QUESTION = "What does the ledger of 1843 say about the barrels in the harbour?"
GERMAN_QUESTION = "Was steht im Hauptbuch von 1843 über die Fässer im Hafen geschrieben?"
GERMAN = "Es wurden zwölf Fässer gelandet, und keines davon ist jemals bezahlt worden."
ENGLISH = "Twelve barrels were landed there, and none of them has ever been paid for."


def fault(
    answer: str,
    branch: str = "chosen",
    *,
    finished: bool = True,
    question: str = QUESTION,
    context: str = ENGLISH,
    names: tuple[FilterName, ...] = DEFAULT_FILTERS,
) -> str | None:
    filters = Filters(names)
    return filters.fault(answer, branch, finished=finished, question=question, context=context)


CASES: list[tuple[str, str | None]] = [
    ("It was founded in 1843.", None),
    (" ", "empty"),
    ("42.", "wordless"),
    ("Yes.", "wordless"),
    ("I\u2019m sorry, but that is not given.", "refusal"),
    (f"The letter of 1843 ends so. {ENGLISH} {ENGLISH[:-1]}, he says. I am sorry, he wrote.", None),
    ("no " * 100, "repetition"),
    ("<think>Twelve?</think> Twelve barrels.", "thinking"),
    ("Twelve.</think> Twelve barrels.", "thinking"),
    ("The function `think` returns <int> barrels.", None),
    (GERMAN, "language"),
    (ENGLISH, None),
]


@pytest.mark.parametrize(("answer", "reason"), CASES)
@pytest.mark.parametrize("branch", ["chosen", "rejected"])
def test_faults(answer: str, reason: str | None, branch: str) -> None:
    assert fault(answer, branch) == (reason and f"{branch} answer: {reason}")


def test_unfinished_answers_are_kept_unless_told() -> None:
    assert fault(ENGLISH, finished=False) is None
    assert fault(ENGLISH, finished=False, names=("unfinished",)) == "chosen answer: unfinished"
    assert fault(ENGLISH, names=("unfinished",)) is None


SAID = "It is kept in the old mill."  # 7 words


@pytest.mark.parametrize(
    ("answer", "loops"),
    [
        (SAID, False),
        (f"{SAID} {SAID}", False),
        (f"{SAID} {SAID} {SAID} {SAID}", True),
        ("The answer is:\n\n" * 16, True),
        ("The lid is red.\n```\n" + "#\n" * 30, True),
        (f"{ENGLISH} {SAID} " + "The end came soon. " * 4, False),  # it ends so, but says more
        ("那是一个木箱。" * 5, True),
        ("这本账簿上写着一共有十二桶货物上岸,但是没有一桶付过钱。", False),
        ("no " * 3, False),
        ("", False),
    ],
)
def test_loops(answer: str, loops: bool) -> None:
    assert is_loop(answer) == loops
    assert fault(answer, names=("chosen_loop",)) == ("chosen answer: loop" if loops else None)
    assert fault(answer, "rejected", names=("chosen_loop",)) is None
    assert fault(answer, "rejected", names=("loop",)) == (
        "rejected answer: loop" if loops else None
    )


def test_rejected_answers_may_loop_unless_told() -> None:
    text = f"{SAID} " * 4
    assert fault(text) == "chosen answer: loop"
    assert fault(text, "rejected") is None


def test_unfinished_chosen_answers_alone() -> None:
    names: tuple[FilterName, ...] = ("chosen_unfinished",)
    assert fault(ENGLISH, finished=False, names=names) == "chosen answer: unfinished"
    assert fault(ENGLISH, "rejected", finished=False, names=names) is None


def test_every_filter_can_be_switched() -> None:
    failing = {reason: answer for answer, reason in CASES if reason}
    by_branch = {"loop", "chosen_loop", "unfinished", "chosen_unfinished"}
    assert {*failing, "same", *by_branch} == set(get_args(FilterName))
    for name in (name for name in get_args(FilterName) if name in failing):
        answer = failing[name]
        others = tuple(other for other in get_args(FilterName) if other != name)
        assert fault(answer, names=(name,)) == f"chosen answer: {name}"
        assert fault(answer, names=others) != f"chosen answer: {name}"
    assert Filters().pair_fault("It is\nseven.", "it is seven.") == "rejected answer: same"
    assert Filters(()).pair_fault("a b", "a b") is None


def test_rejected_answers_may_repeat_more() -> None:
    text = "one two three four " * 15  # 60 words, 4 different: 0.933 repeated
    assert MOST_REPEATED["chosen"] < 1 - 4 / 60 < MOST_REPEATED["rejected"]
    names: tuple[FilterName, ...] = ("repetition",)
    assert fault(text, "chosen", names=names) == "chosen answer: repetition"
    assert fault(text, "rejected", names=names) is None


def test_same_answer() -> None:
    assert same_answer("It is\nseven.", "it is seven.")
    assert not same_answer("It is seven.", "It is seven!")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ENGLISH, "en"),
        (GERMAN, "de"),
        ("Le port ouvre à neuf heures du matin et ferme le soir à six heures.", "fr"),
        ("这本账簿上写着一共有十二桶货物上岸,但是没有一桶付过钱,船长也不知道为什么。", "zh"),
        ("Hafen um neun", None),
        ("base.Stream, size, unit, rest and kib", None),
        ("```\nfor line in lines: print(line)\n``` `the value of this is not here at all`", None),
    ],
)
def test_languages(text: str, expected: str | None) -> None:
    assert language(text) == expected


def test_an_answer_may_have_the_language_of_its_text() -> None:
    assert not other_language(GERMAN, QUESTION, GERMAN)
    assert not other_language(ENGLISH, QUESTION, GERMAN)
    assert other_language(ENGLISH, GERMAN_QUESTION, GERMAN)
    assert other_language(GERMAN, QUESTION, "x = 1\n" * 50)
    assert not other_language(GERMAN, "42?", ENGLISH)
