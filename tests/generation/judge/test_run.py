from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.cli import main
from megatron_longpo.data.text.examples import ExampleFile, write_examples
from megatron_longpo.errors import UserError
from megatron_longpo.generation.backends.base import Completion
from megatron_longpo.generation.judge import run as judge
from megatron_longpo.generation.shards import failures
from tests.generation.judge.judging import Judge, config


def test_scores_are_written(examples: str, backend: Judge) -> None:
    settings = config(examples)
    summary = judge.run_judge(settings)
    assert (summary.num_kept, summary.num_kept_turns) == (3, 6)
    judged, given = list(ExampleFile(settings.output)), list(ExampleFile(examples))
    for after, before in zip(judged, given, strict=True):
        assert (after.id, after.document, after.turns) == (before.id, before.document, before.turns)
        scores = {"model": "m", "support": [5, 2], "better": [1.0, 0.0]}
        assert after.meta == {**before.meta, "judge": scores}
    assert len(backend.asked) == 18
    assert all(text.startswith("Chunk number") for text in backend.asked)
    assert not Path(settings.output + ".scores").exists()


def test_a_judge_that_favours_a_place_prefers_neither(examples: str, backend: Judge) -> None:
    backend._reply = lambda text: Completion(text="A", finished=True)  # type: ignore[method-assign]
    judge.run_judge(config(examples))
    scores = [e.meta["judge"] for e in ExampleFile(config(examples).output)]
    assert all(one["better"] == [0.5, 0.5] and one["support"] == [None, None] for one in scores)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"least_support": 3.0}, "turn: support below least_support"),
        ({"least_better": 0.75}, "turn: better below least_better"),
    ],
)
def test_turns_are_dropped_by_score(
    examples: str, backend: Judge, changes: dict[str, Any], reason: str
) -> None:
    settings = config(examples, **changes)
    summary = judge.run_judge(settings)
    assert summary.dropped == {reason: 3}
    for example in ExampleFile(settings.output):
        assert [one.question for one in example.turns] == ["What of 1?"]
        assert example.meta["kinds"] == ["a"]
        assert example.meta["judge"]["support"] == [5]


def test_scores_that_cannot_be_read_are_dropped_where_one_is_asked_for(
    examples: str, backend: Judge
) -> None:
    backend._reply = lambda text: Completion(text="Hm.", finished=True)  # type: ignore[method-assign]
    with pytest.raises(
        UserError, match=r"no example is left \(6 x turn: support unknown\); set le"
    ):
        judge.run_judge(config(examples, least_support=1.0))
    asked = len(backend.asked)
    assert judge.run_judge(config(examples)).num_kept == 3  # from the scores that were kept
    assert len(backend.asked) == asked


def test_turns_over_the_context_are_not_asked_about(
    examples: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_judge = Judge(context_length=100)
    monkeypatch.setattr(judge, "make_backend", lambda _: small_judge)
    judge.run_judge(config(examples))
    assert not small_judge.asked
    assert ExampleFile(config(examples).output)[0].meta["judge"]["better"] == [None, None]


def test_an_interrupted_run_goes_on(examples: str, backend: Judge) -> None:
    judge.run_judge(config(examples))
    whole = Path(config(examples).output).read_bytes()
    settings = config(examples, output=str(Path(examples).with_name("again.jsonl")))

    def interrupt(text: str) -> bool:
        if len(backend.asked) == 18 + 10:
            raise KeyboardInterrupt
        return False

    backend.broken = interrupt
    with pytest.raises(KeyboardInterrupt):
        judge.run_judge(settings)
    scores = Path(settings.output + ".scores")
    assert 1 <= len(scores.read_text().splitlines()) < 3
    with open(scores, "ab") as file:
        file.write(b'{"settings": "cut sho')
    backend.broken = lambda text: False
    backend.asked.clear()
    judge.run_judge(settings)
    assert Path(settings.output).read_bytes() == whole
    assert 0 < len(backend.asked) < 18


def test_a_judge_that_fails_on_everything_is_given_up(
    examples: str, backend: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "MOST_IN_A_ROW", 2)
    write_examples(examples, [*ExampleFile(examples)] * 3)
    backend.broken = lambda text: True
    with pytest.raises(
        UserError, match=r"4 documents in a row failed, the last \(.*:4\) with: serv"
    ):
        judge.run_judge(config(examples, skip_failed=True))
    assert len(backend.asked) < 6 * 3  # the others under way end


def test_examples_that_failed_can_be_left_out(examples: str, backend: Judge) -> None:
    failures = 0

    def first_only(text: str) -> bool:
        nonlocal failures
        failures += 1
        return failures == 1

    backend.broken = first_only
    with pytest.raises(UserError, match="1 of 3 examples could not be judged"):
        judge.run_judge(config(examples))
    assert not Path(config(examples).output).exists()
    backend.asked.clear()
    assert judge.run_judge(config(examples)).num_kept == 3  # only the one is asked again
    assert len(backend.asked) == 6
    failures = 0
    settings = config(examples, output=str(Path(examples).with_name("b")), skip_failed=True)
    assert judge.run_judge(settings).num_kept == 2


def test_the_command_with_a_real_model(
    examples: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Path(examples).with_name("real.jsonl")
    options = ["judge", examples, f"--output={output}", f"--model={model}", "--dtype=fp32"]
    assert main([*options, "--max_new_tokens=4", "--num_threads=1"]) == 0
    assert "3 of 3 examples with 6 of 6 turns; support" in capsys.readouterr().out
    for line in output.read_text().splitlines():
        assert set(json.loads(line)["meta"]["judge"]) == {"model", "support", "better"}
    assert main([*options, "--num_threads=1"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
