from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_longpo.evaluation.harness.judge_prompts import (
    OURS,
    prompt_name,
    read_prompts,
    read_rating,
)


def test_the_benchmarks_own_judge_prompts_are_used(tmp_path: Path) -> None:
    line = {
        "name": "single-v1",
        "system_prompt": "S",
        "prompt_template": "Q {question} {x} {answer}",
    }
    (tmp_path / "judge_prompts.jsonl").write_text(json.dumps(line) + "\n")
    prompts = read_prompts(tmp_path)
    fields = {"question": "a {answer}", "answer": "b"}
    assert [m["content"] for m in prompts["single-v1"].messages(fields)] == [
        "S",
        "Q a {answer} {x} b",
    ]
    assert prompts["single-math-v1"] == OURS["single-math-v1"]
    assert prompt_name(1, ["7"]) == "single-v1-multi-turn"
    assert prompt_name(1, ["7", "8"]) == "single-math-v1-multi-turn"
    assert prompt_name(0, ["7"]) == "single-math-v1"


@pytest.mark.parametrize(
    ("text", "rating"),
    [("[[5]]", 5), ("[[ 7.5 ]]", 7.5), ("[[8/10]]", 8), ("[[0]]", None), ("5", None)],
)
def test_ratings(text: str, rating: float | None) -> None:
    assert read_rating(text) == rating
