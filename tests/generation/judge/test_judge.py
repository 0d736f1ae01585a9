from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.cli import main
from megatron_longpo.config.judge import JudgeConfig
from megatron_longpo.data.text.examples import Example, ExampleFile, Turn, write_examples
from megatron_longpo.data.text.hf_tokenizer import HuggingFaceTokenizer
from megatron_longpo.errors import UserError
from megatron_longpo.generation.backends.base import BackendError, Completion, Request
from megatron_longpo.generation.judge import run as judge
from megatron_longpo.generation.judge import scores as judge_scores
from megatron_longpo.generation.judge.verdicts import read_preference, read_score
from megatron_longpo.generation.shards import failures
from megatron_longpo.generation.shards.locks import hold
from tests import small_tokenizers as small


def turn(number: int, chosen: str = "It is right.", rejected: str = "It is wrong.") -> Turn:
    chunk = f"Chunk number {number} of it."
    return Turn(
        chunk=chunk,
        chunk_span=None,
        question=f"What of {number}?",
        chosen=chosen,
        rejected=rejected,
    )


@pytest.fixture
def examples(tmp_path: Path) -> str:
    path = tmp_path / "examples.jsonl"
    write_examples(
        path,
        [
            Example(
                id=name,
                document=f"A document called {name}.",
                turns=(turn(1), turn(2, "It is poor.", "It is right.")),
                meta={"kinds": ["a", "b"], "source": name},
            )
            for name in ("one", "two", "three")
        ],
    )
    return str(path)


class Judge:
    """Likes the answer `right`, scores it 5 and others 2."""

    documents_at_once = 2

    def __init__(self, context_length: int = 2048) -> None:
        self.context_length = context_length
        self.tokenizer = HuggingFaceTokenizer(
            small.byte_level(tuple(small.CHATML_SPECIAL), "<|im_end|>"),
            name="judge",
            chat_template=small.CHATML,
        )
        self.asked: list[str] = []
        self.broken: Callable[[str], bool] = lambda text: False

    async def complete(self, requests: Sequence[Request]) -> list[Completion | BackendError]:
        return [self._reply(request.messages[-1]["content"]) for request in requests]

    def _reply(self, text: str) -> Completion | BackendError:
        self.asked.append(text)
        if self.broken(text):
            return BackendError("server that answered 500")
        if "How well" in text:
            reply = "Score: 5/5" if "Answer: It is right." in text else "2 out of 5."
        else:
            reply = "**A**" if "Answer A: It is right." in text else "The better answer is B."
        return Completion(text=reply, finished=True)

    async def close(self) -> None:
        pass


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Judge:
    made = Judge()
    monkeypatch.setattr(judge, "make_backend", lambda _: made)
    return made


def config(examples: str, **changes: Any) -> JudgeConfig:
    output = str(Path(examples).with_name("judged.jsonl"))
    return JudgeConfig(**{"model": "models/m", "examples": examples, "output": output, **changes})


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


def test_scores_of_other_settings_are_refused(examples: str, backend: Judge) -> None:
    backend.broken = lambda text: "Chunk number 2" in text
    with pytest.raises(
        UserError, match=r"3 of 3 examples could not be judged \(3 x server that ans"
    ):
        judge.run_judge(config(examples))
    backend.broken = lambda text: False
    scores = Path(config(examples).output + ".scores")
    scores.write_text('{"settings":"other","example":0,"turns":[]}\n')
    with pytest.raises(UserError, match=r"scores:1: was scored with another model, examples or"):
        judge.run_judge(config(examples))
    assert judge.run_judge(config(examples, overwrite=True)).num_kept == 3


def test_damaged_scores_are_named(
    examples: str, backend: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "_fingerprint", lambda *_: "f")
    scores = Path(config(examples).output + ".scores")
    for line in ('{"settings":"f"}', '{"settings":"f","example":0,"turns":[{"good":1}]}'):
        scores.write_text(line + "\n")
        with pytest.raises(UserError, match=r"scores:1: is damaged \(.*remove the line"):
            judge.run_judge(config(examples))


FULL_DISK = """
import resource, sys
from pathlib import Path
from megatron_longpo.errors import UserError
from megatron_longpo.generation.judge_scores import ScoreFile, TurnScores
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
with ScoreFile.opened(Path(sys.argv[1]), "f", overwrite=False) as file:
    try:
        for index in range(1000):
            file.append(index, [TurnScores(support=5, better=1.0)])
    except UserError as error:
        print(error)
"""


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    output = tmp_path / "judged.jsonl"
    command = [sys.executable, "-c", FULL_DISK, str(output)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "judged.jsonl.scores: cannot be written (File too large); what is finished is" in told
    assert [one.name for one in tmp_path.iterdir()] == ["judged.jsonl.scores"]
    data = (tmp_path / "judged.jsonl.scores").read_bytes()
    assert data.endswith(b"\n") and len(data) > 4_900
    with judge_scores.ScoreFile.opened(output, "f", overwrite=False) as file:
        assert sorted(file.scores) == list(range(data.count(b"\n")))


def test_two_judges_of_one_output(examples: str, backend: Judge) -> None:
    lock = Path(config(examples).output + ".lock")
    with (
        hold(lock, what="x"),
        pytest.raises(UserError, match=rf"process {os.getpid()} on \S+; wai"),
    ):
        judge.run_judge(config(examples, overwrite=True))
    assert backend.asked == []
    assert judge.run_judge(config(examples)).num_kept == 3
    assert not lock.exists()


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


# ---------------------------------------------------------------- verdicts


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
