from __future__ import annotations

import functools
import io

import pytest
from rich.console import Console

from megatron_longpo.engine import console
from megatron_longpo.engine.console import RunConsole


def test_only_the_main_rank_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    for is_main in (True, False):
        speaker = RunConsole(is_main=is_main)
        speaker.say(f"main {is_main} [not markup]")
        assert list(speaker.track(range(3), what="counting", total=3)) == [0, 1, 2]
    assert capsys.readouterr().out == "main True [not markup]\n"


def test_lines_say_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    speaker = RunConsole(is_main=True)
    speaker.say_step(
        {"step": 3, "loss": 0.123456, "nll_loss": None, "learning_rate": 5e-7, "other": 1.0},
        num_steps=10,
    )
    speaker.say_evaluation({"step": 4, "eval/loss": 0.1234567, "eval/nll_loss": None})
    assert capsys.readouterr().out.splitlines() == [
        "step 3/10  loss 0.1235  lr 5e-07",
        "evaluation at step 4  loss 0.123457",
    ]


def test_parts_of_the_loss_are_shown_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "answer_nll_loss": 4.0,
        "alignment_loss": 3.0,
        "rewards/margins": 5.0,
        "nll_loss": 2.0,
        "logps/chosen": 9.0,
        "preference_loss": 1.0,
        "loss": 0.5,
    }
    RunConsole(is_main=True).say_step({"step": 1, **values}, num_steps=2)
    assert capsys.readouterr().out == (
        "step 1/2  loss 0.5  preference 1  nll 2  alignment 3  answer nll 4  margin 5\n"
    )


def test_a_bar_inside_anothers_loop_leaves_it_running(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation comes and goes while training has its bar."""
    terminal = functools.partial(Console, file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(console, "Console", terminal)
    speaker = RunConsole(is_main=True)
    seen = []
    for step in speaker.track(range(3), what="training", total=5, done=2):
        if step == 1:
            for _ in speaker.track("ab", what="evaluating", total=2):
                seen.append(("inside", len(speaker._progress.tasks)))
        seen.append((str(step), len(speaker._progress.tasks)))
        assert speaker._progress.live.is_started
        assert speaker._progress.tasks[0].completed == 2 + step
    assert seen == [("0", 1), ("inside", 2), ("inside", 2), ("1", 1), ("2", 1)]
    assert not speaker._progress.live.is_started and not speaker._progress.tasks
