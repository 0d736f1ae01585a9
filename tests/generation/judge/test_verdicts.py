from __future__ import annotations

import pytest

from megatron_longpo.generation.judge.verdicts import read_preference, read_score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("4", 4),
        (" **4** ", 4),
        ("4.", 4),
        ("4/5", 4),
        ("Score: 3", 3),
        ("**Score:** 3 out of 5", 3),
        ("I would rate it 2 on a scale of 1 to 5.", 2),
        ("On a scale from 1-5: 5", 5),
        ('{"score": 4, "reason": "The 2 facts are there."}', 4),
        ("Five.", 5),
        ("<think>Is it 2 or 3?</think>\n5", 5),
        ("The rating is 4 because 3 of the facts are there.", 4),
        ("5 - the text says all of it", 5),
        ("7", None),
        ("45", None),
        ("2 or 3", None),
        ("The text supports it.", None),
        ("", None),
        ("<think>4", None),
    ],
)
def test_scores(text: str, score: int | None) -> None:
    assert read_score(text) == score


@pytest.mark.parametrize(
    ("text", "preference"),
    [
        ("A", 1.0),
        ("b.", 0.0),
        ("**B**", 0.0),
        ("(C)", 0.5),
        ("Answer A", 1.0),
        ("Answer: B", 0.0),
        ("The better answer is A.", 1.0),
        ("I choose B because A is wrong.", 0.0),
        ('{"answer": "A"}', 1.0),
        ("A is better than B.", 1.0),
        ("B is right.", 0.0),
        ("Neither is better.", 0.5),
        ("Both are the same.", 0.5),
        ("<think>A? No.</think>B", 0.0),
        ("A good question.", None),
        ("I can't say.", None),
        ("", None),
    ],
)
def test_preferences(text: str, preference: float | None) -> None:
    assert read_preference(text) == preference
