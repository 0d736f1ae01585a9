"""`longpo evaluate` on folders and checkpoints, gone on with, and its bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from checkpoints_convert.megatron_to_hf import run_export
from megatron_longpo.config.convert import ExportConfig
from megatron_longpo.config.evaluate import EvaluateConfig, check_evaluate_world, resolve_evaluate
from megatron_longpo.config.evaluation import EvaluationConfig
from megatron_longpo.config.parser import load_config
from megatron_longpo.data.text.tokenizers import load_tokenizer
from megatron_longpo.engine import run_folder
from megatron_longpo.errors import UserError
from megatron_longpo.evaluation import evaluate
from megatron_longpo.evaluation.generation import answer_questions
from megatron_longpo.evaluation.retrieval import make_retrieval
from megatron_longpo.evaluation.scorer import Scorer
from megatron_longpo.evaluation.suite import Suite
from megatron_longpo.training import loop
from tests.evaluation.oracle import oracle_record
from tests.evaluation.ranks import EVALUATED
from tests.evaluation.suites import (
    RETRIEVAL,
    assert_same_record,
    evaluation_config,
    favour_digits,
)
from tests.parity.cases import LORA
from tests.parity.harness import Shelf, load_hf
from tests.torchrun import ROOT, rank_environment
from tests.training.short_runs import short_config

pytestmark = pytest.mark.usefixtures("single_process", "own_signal_handlers")


def evaluate_config(shelf: Shelf, folder: Path, model: str, **settings: Any) -> EvaluateConfig:
    values: dict[str, Any] = {
        "models": (model,),
        "output": str(folder),
        "base": shelf.hf_folder(EVALUATED.policy),
        "dtype": "fp32",
        "evaluation": evaluation_config(shelf.root),
        **settings,
    }
    return resolve_evaluate(EvaluateConfig(**values))


def results(folder: Path) -> dict[str, Any]:
    contents: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return contents


@pytest.fixture
def model(shelf: Shelf) -> str:
    folder = shelf.hf_folder(EVALUATED.policy)
    favour_digits(folder)
    return folder


def test_a_folder_gives_the_figures_of_plain_transformers(
    model: str, shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = evaluate_config(shelf, tmp_path, model, rope_theta=50000.0)
    evaluate.evaluate(config)
    found = results(tmp_path)
    assert found["complete"] and found["model"] == model
    suite = Suite.of(config.evaluation, lambda: load_tokenizer(model), vocab_size=300)
    expected = oracle_record(shelf.oracle_policy(EVALUATED), load_hf(model), suite)
    assert_same_record(found["results"], expected)
    said = capsys.readouterr().out
    assert all(name in said for name in ("retrieval/passkey/360", "nll/120-240", "retention/kl"))
    assert found["numbers"]["nll/0-120"] == found["results"]["nll"][0]["nll"]


def test_it_goes_on_where_it_was_stopped(
    model: str, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate_config(shelf, tmp_path / "whole", model)
    evaluate.evaluate(whole)
    scored: list[int] = []
    original = Scorer.score

    def counted(self: Scorer, probes: Any, **others: Any) -> Any:
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.append(len(probes))
        return original(self, probes, **others)

    monkeypatch.setattr(Scorer, "score", counted)
    config = evaluate_config(shelf, tmp_path / "stopped", model)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(config)
    assert not results(tmp_path / "stopped")["complete"]
    monkeypatch.setattr(Scorer, "score", original)
    evaluate.evaluate(config)
    assert results(tmp_path / "stopped")["results"] == results(tmp_path / "whole")["results"]
    # Nothing is left: no model is built.
    monkeypatch.setattr(evaluate.build, "build_scorer", None)
    evaluate.evaluate(config)
    other = replace(config, evaluation=EvaluationConfig(retrieval=RETRIEVAL), base=None)
    with pytest.raises(UserError, match=r"was made with another base; choose another output"):
        evaluate.evaluate(resolve_evaluate(other))


@pytest.mark.parametrize("kind", ["whole", "adapters"])
def test_a_checkpoint_gives_the_figures_of_its_export(
    kind: str, model: str, shelf: Shelf, tmp_path: Path
) -> None:
    case = replace(EVALUATED, name=f"evaluated-{kind}", lora=LORA if kind == "adapters" else None)
    run = loop.prepare(short_config(shelf, tmp_path / "run", case=case, steps=2))
    loop.train(run)
    checkpoints = str(tmp_path / "run" / "checkpoints")
    run_export(ExportConfig(source=checkpoints, destination=str(tmp_path / "hf")))
    for source in (checkpoints, str(tmp_path / "hf")):
        evaluate.evaluate(evaluate_config(shelf, tmp_path / Path(source).name, source))
    trained, exported = results(tmp_path / "checkpoints"), results(tmp_path / "hf")
    assert trained["model"].endswith("iter_0000002")
    assert_same_record(trained["results"], exported["results"])
    # And it has trained: its figures are not the base's.
    assert trained["results"]["retention"]["kl"] > 1e-3


def test_answers_are_looked_through_for_the_number(model: str) -> None:
    """Half of the answers hold it; of the others one has digits of it."""
    tokenizer = load_tokenizer(model)
    retrieval = make_retrieval(replace(RETRIEVAL, kinds=("passkey",), lengths=(360,)), tokenizer)
    values = iter(question.value for question in retrieval.questions)
    asked: list[list[int]] = []

    def generate(prompt: torch.Tensor, **settings: Any) -> torch.Tensor:
        assert settings["max_new_tokens"] == 12 and settings["do_sample"] is False
        value, number = next(values), len(asked)
        asked.append(prompt[0].tolist())
        text = f"It is {value}.<|im_end|>" if number % 2 == 0 else f"It is {value[:-1]}."
        return torch.cat([prompt, torch.tensor([tokenizer.encode(text)])], dim=1)

    writer = SimpleNamespace(device=torch.device("cpu"), generate=generate)
    found = answer_questions(writer, tokenizer, retrieval, retrieval.questions, new_tokens=12)
    assert found == [True, False, True, False, True, False]
    assert asked == [retrieval.prompt(question).tolist() for question in retrieval.questions]
    assert all(tokenizer.decode(prompt).endswith("<|im_start|>assistant\n") for prompt in asked)


def test_written_answers_stand_beside_the_forced_ones(
    model: str, shelf: Shelf, tmp_path: Path
) -> None:
    retrieval = replace(RETRIEVAL, lengths=(360,), samples=1)
    config = evaluate_config(
        shelf, tmp_path, model, base=None, evaluation=EvaluationConfig(retrieval=retrieval)
    )
    evaluate.evaluate(config)
    assert "generated/360" not in results(tmp_path)["numbers"]
    writing = replace(config, generate=True, new_tokens=3)
    evaluate.evaluate(writing)
    # What was written stays where nothing is to be written.
    evaluate.evaluate(config)
    with pytest.raises(UserError, match="was made with another new_tokens"):
        evaluate.evaluate(replace(writing, new_tokens=4))
    cells = results(tmp_path)["results"]["retrieval"]
    assert [cell["generated"] for cell in cells] == [0.0] * 6
    assert results(tmp_path)["numbers"]["generated/360"] == 0.0


def message_of(*argv: str, world_size: int = 1) -> str:
    with pytest.raises(UserError) as raised:
        config = resolve_evaluate(
            load_config(EvaluateConfig, argv, command="evaluate", positionals=("models",))
        )
        check_evaluate_world(config, world_size)
        evaluate.evaluate(config)
    message = str(raised.value)
    assert "\n" not in message
    return message


SAMPLES = "--evaluation.retrieval.samples=1"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "models is missing"),
        (["a", "b", "--output=o"], "models (a, b): one model is evaluated at a time"),
        (["a"], "output is missing"),
        (["a", "--output=o"], "evaluation has no part that is on"),
        (["a", "--output=o", "--evaluation.retention.max_length=9"], "base is missing"),
        (["a", "--output=o", SAMPLES, "--base=b"], "base (b) is for evaluation.retention"),
        (["a", "--output=o", SAMPLES, "--evaluation.retrieval.depths=[2]"], "depths (2) must be"),
        (["a", "--output=o", SAMPLES, "--evaluation.retrieval.lengths=[]"], "leaves nothing to"),
        (["a", "--output=o", SAMPLES, "--evaluation.retrieval.kinds=[x]"], "item one of passkey"),
        (["a", "--output=o", "--evaluation.nll.length=9"], "evaluation.nll.documents is missing"),
        (["a", "--output=o", SAMPLES, "--generate", "--rope_theta=5"], "without rope_theta"),
        (["none/of/it", "--output=o", SAMPLES], "none/of/it: no such folder, and not a hub id"),
    ],
)
def test_bad_settings(
    argv: Sequence[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in message_of(*argv)
    assert not list(tmp_path.iterdir())


def test_bad_models(model: str, shelf: Shelf, tmp_path: Path) -> None:
    output = f"--output={tmp_path / 'o'}"
    (tmp_path / "empty").mkdir()
    assert "neither config.json of a Hugging Face model nor latest_checkpointed_iteration" in (
        message_of(str(tmp_path / "empty"), output, SAMPLES)
    )
    other = shelf.hf_folder(replace(EVALUATED.policy, vocab_size=400))
    message = message_of(model, output, "--evaluation.retention.max_length=999", f"--base={other}")
    assert "its vocabulary has 400 tokens" in message
    message = message_of(model, output, SAMPLES, "--generate", world_size=2)
    assert message.startswith("generate (true) runs in one process, and 2 were started")
    message = message_of(model, output, SAMPLES, "--parallel.tensor=2", world_size=3)
    assert "must divide the number of processes (3)" in message


def test_the_base_of_adapters_may_have_moved(model: str, shelf: Shelf, tmp_path: Path) -> None:
    moved = tmp_path / "first"
    shutil.copytree(model, moved)
    config = short_config(shelf, tmp_path / "run", case=replace(EVALUATED, lora=LORA), steps=1)
    run = loop.prepare(replace(config, model=replace(config.model, hf_path=str(moved))))
    loop.train(run)
    moved.rename(tmp_path / "second")
    checkpoints = str(tmp_path / "run" / "checkpoints")
    output = f"--output={tmp_path / 'o'}"
    message = message_of(checkpoints, output, SAMPLES)
    assert message.endswith("if the base model has moved, say where it is: --adapter_base")
    retrieval = EvaluationConfig(retrieval=replace(RETRIEVAL, lengths=(360,), samples=1))
    config_of_moved = evaluate_config(
        shelf,
        tmp_path / "o",
        checkpoints,
        base=None,
        evaluation=retrieval,
        adapter_base=str(tmp_path / "second"),
    )
    evaluate.evaluate(config_of_moved)
    assert results(tmp_path / "o")["complete"]


def test_the_command_on_two_ranks_goes_on_with_one_s(
    model: str, shelf: Shelf, tmp_path: Path
) -> None:
    """As a user gives it; one process measures a part, two the others, in the same output."""
    evaluation = evaluation_config(shelf.root)
    file = tmp_path / "evaluate.yaml"
    contents = run_folder.plain({"dtype": "fp32", "evaluation": asdict(evaluation)})
    file.write_text(yaml.safe_dump(contents))
    whole = evaluate_config(shelf, tmp_path / "whole", model)
    evaluate.evaluate(whole)
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    found = results(tmp_path / "whole")
    del found["results"]["nll"], found["results"]["retention"]
    (stopped / "evaluation.json").write_text(json.dumps(found))
    base = shelf.hf_folder(EVALUATED.policy)
    command = f"evaluate {model} --config {file} --base {base} --output {stopped} --nproc 2"
    command += " --parallel.context 2"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megatron_longpo", *command.split()],
        cwd=ROOT,
        env={**os.environ, **rank_environment()},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "measured: retention" in done.stdout and "measured: retrieval" not in done.stdout
    assert_same_record(results(stopped)["results"], results(tmp_path / "whole")["results"])
