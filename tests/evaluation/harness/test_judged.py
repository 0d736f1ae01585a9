from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.evaluation.harness.commands import run_command
from tests.generation.backends.loopback import loopback

pytestmark = pytest.mark.usefixtures("single_process", "own_signal_handlers")


def test_a_judge_scores_every_turn_once(model: str, data: Path, tmp_path: Path) -> None:
    with loopback() as server:
        server.answer = "Fine. [[3]] no, Rating: [[7]]"
        given = (
            "--suite=mt_bench,longbench_chat",
            f"--harness.judge.endpoints=[{server.url}]",
            "--harness.max_length=1400",
        )
        found = run_command(model, data, tmp_path, *given)
        assert found["numbers"]["suite/mt_bench"] == 7
        assert found["numbers"]["suite/mt_bench/turn_2"] == 7
        assert found["numbers"]["suite/longbench_chat"] == 7
        asked = [body["messages"][1]["content"] for body in server.bodies]
        assert len(asked) == 5 and server.bodies[0]["temperature"] == 0
        answers = [json.loads(x) for x in (tmp_path / "harness/mt_bench/answers.jsonl").open()]
        second = next(text for text in asked if "And twice that?" in text)
        assert all(text in second for text in ("What is 3 + 4?", "14", *answers[1]["answers"]))
        # The judge is not shown the document.
        long = next(text for text in asked if "What is it?" in text)
        assert "A." in long and len(long) < 20000 and "Dr. Ledger" not in long
        run_command(model, data, tmp_path, *given)
        assert len(server.bodies) == 5
        # A verdict that was lost is asked for again, and only that.
        contents = json.loads((tmp_path / "evaluation.json").read_text())
        contents["results"]["suites"]["mt_bench"]["cells"] = []
        (tmp_path / "evaluation.json").write_text(json.dumps(contents))
        verdicts = tmp_path / "harness/mt_bench/verdicts.jsonl"
        verdicts.write_text("".join(verdicts.open().readlines()[:-1]))
        server.answer = "[[9]]"
        found = run_command(model, data, tmp_path, *given)
        assert len(server.bodies) == 6
        assert found["numbers"]["suite/mt_bench/turn_2"] == 8
