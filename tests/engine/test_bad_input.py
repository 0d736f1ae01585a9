"""What a user gets wrong costs one line and exit code 2, before a weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from megatron_longpo import cli
from megatron_longpo.data.rows.schema import row_columns
from megatron_longpo.engine.run_folder import plain_config
from megatron_longpo.errors import EXIT_BAD_INPUT
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.training import loop
from tests.parity.harness import Shelf
from tests.training.short_runs import CASE, POLICY, short_config

Lines = list[dict[str, Any]]


@pytest.fixture
def train(
    shelf: Shelf,
    tmp_path: Path,
    single_process: Groups,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[Sequence[str]], str]:
    """Runs `longpo train` with more arguments; returns its one line on stderr."""
    monkeypatch.setattr(loop.process_groups, "shutdown", lambda: None)
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(plain_config(short_config(shelf, tmp_path / "run"))))

    def run(arguments: Sequence[str]) -> str:
        capsys.readouterr()
        assert cli.main(["train", "--config", str(path), *arguments]) == EXIT_BAD_INPUT
        errors = capsys.readouterr().err
        assert errors.startswith("longpo: ") and errors.count("\n") == 1, errors
        assert not (tmp_path / "run").exists()
        return errors

    return run


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **more: Any) -> None:
        raise AssertionError("the model was built before the mistake was found")

    monkeypatch.setattr(loop.build, "build_model", refuse)


def good_lines() -> Lines:
    return [row_columns(row) for row in CASE.rows]


def with_a_strange_token() -> Lines:
    lines = good_lines()
    lines[2]["chosen_input_ids"][1] = 300
    return lines


def with_a_turn_too_few() -> Lines:
    lines = good_lines()
    for column in ("input_ids", "attention_mask", "labels"):
        for branch in ("ref_chosen", "ref_rejected"):
            lines[1][f"{branch}_{column}"] = lines[1][f"{branch}_{column}"][:1]
    return lines


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        (good_lines, ["--data.path", "nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        (good_lines, ["--data.eval_path", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (list, [], "rows.jsonl: holds no rows"),
        (with_a_strange_token, [], "rows.jsonl:3: chosen_input_ids[1] is 300, outside"),
        (
            with_a_turn_too_few,
            [],
            "rows.jsonl:2: answers of the row: chosen",
        ),
        (good_lines, ["--data.pack_tokens", "40"], "data.pack_tokens (40): pair 'pair0'"),
        (good_lines, ["--data.max_length", "40"], "rows.jsonl:1: chosen_input_ids has 45 tokens"),
        (
            good_lines,
            ["--train.global_batch_pairs", "11"],
            "train.global_batch_pairs (11): data.path has only 10 usable pairs",
        ),
        (good_lines, ["--model.hf_path", "nowhere"], "nowhere: no such folder"),
        (good_lines, ["--reference.hf_path", "nowhere"], "nowhere: no such folder"),
        (good_lines, ["--checkpoint.resume", "nowhere"], "nowhere: no torch_dist checkpoint"),
        (
            good_lines,
            ["--optimizer.name=adam", "--optimizer.state_dtype=bf16"],
            "optimizer.state_dtype (bf16): adam needs Transformer Engine for it, and it needs a",
        ),
        (good_lines, ["--logging.dir", "{rows}/run"], "logging.dir"),
        (good_lines, ["--checkpoint.dir", "{rows}/run"], "checkpoint.dir"),
    ],
)
def test_one_line_before_anything_is_built(
    lines: Callable[[], Lines],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    train: Callable[[Sequence[str]], str],
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines()))
    arguments = [argument.format(rows=rows) for argument in arguments]
    assert message in train(["--data.path", str(rows), *arguments])


@pytest.mark.usefixtures("no_weights")
def test_a_reference_with_fewer_token_ids(
    shelf: Shelf, train: Callable[[Sequence[str]], str]
) -> None:
    smaller = shelf.hf_folder(replace(POLICY, vocab_size=260 + 2, seed=8))
    assert "outside the model's vocabulary of 262" in train(["--reference.hf_path", smaller])


@pytest.mark.parametrize("damage", ["nan", "missing", "shape"])
def test_damaged_weights_are_named(
    damage: str, shelf: Shelf, tmp_path: Path, train: Callable[[Sequence[str]], str]
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(shelf.hf_folder(POLICY), folder)
    weights = load_file(folder / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    if damage == "nan":
        norm[3] = float("nan")
    if damage != "missing":
        weights["model.norm.weight"] = norm[:5] if damage == "shape" else norm
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    words = {"nan": "holds NaN", "missing": "is missing", "shape": "has shape [5]"}
    message = train(["--model.hf_path", str(folder)])
    assert "model.norm.weight" in message and words[damage] in message


@pytest.mark.usefixtures("no_weights")
def test_a_run_that_is_there_is_not_written_over(
    tmp_path: Path, train: Callable[[Sequence[str]], str]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").write_text('{"step": 1}\n')
    arguments = ["--checkpoint.resume", "never", "--logging.dir", str(tmp_path / "other")]
    assert "checkpoint.resume (never)" in train(arguments)
