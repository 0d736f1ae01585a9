"""Evaluation during training equals plain transformers, and one process's on any ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.errors import UserError
from megatron_longpo.evaluation.results import flat_numbers
from megatron_longpo.reference import run as reference_pass
from megatron_longpo.training import loop
from tests.evaluation.oracle import oracle_record
from tests.evaluation.ranks import EVALUATED, MODEL
from tests.evaluation.suites import assert_same_record, evaluation_config, favour_digits
from tests.parity.cases import LORA
from tests.parity.harness import Shelf
from tests.parity.peft_adapters import write_b
from tests.torchrun import torchrun
from tests.training.short_runs import metric_rows, short_config

pytestmark = pytest.mark.usefixtures("single_process", "own_signal_handlers")


def evaluated_config(shelf: Shelf, folder: Path, **settings: Any) -> Any:
    favour_digits(shelf.hf_folder(EVALUATED.policy))
    evaluation = evaluation_config(shelf.root)
    return short_config(shelf, folder, case=EVALUATED, evaluation=evaluation, **settings)


@pytest.mark.parametrize("mode", ["online", "none"])
def test_the_figures_are_those_of_plain_transformers(
    mode: str, shelf: Shelf, tmp_path: Path
) -> None:
    """The base is asked in the policy's pass, or once at the start where no reference stays."""
    config = evaluated_config(shelf, tmp_path)
    reference = replace(config.reference, mode=mode)
    run = loop.prepare(replace(config, reference=reference))
    assert (run.evaluation.base is None) == (mode == "online")
    metrics, record = run.evaluation.run(run.model, budget_tokens=run.budget_tokens)
    expected = oracle_record(
        shelf.oracle_policy(EVALUATED), shelf.oracle_reference(EVALUATED), run.evaluation.suite
    )
    assert_same_record(record, expected)
    assert record["retention"]["kl"] > 0.01
    assert 0 < record["retention"]["agreement"] < 1
    assert any(0 < cell["token_accuracy"] < 1 for cell in record["retrieval"])
    assert metrics.pop("eval/time_s") > 0
    assert metrics == {f"eval/{key}": value for key, value in flat_numbers(record).items()}


def test_every_layout_gives_one_process_s_figures(shelf: Shelf, tmp_path: Path) -> None:
    config = evaluated_config(shelf, tmp_path)
    run = loop.prepare(config)
    _, record = run.evaluation.run(run.model, budget_tokens=run.budget_tokens)
    expected = tmp_path / "expected.json"
    expected.write_text(json.dumps(record))
    result = torchrun("tests/evaluation/ranks.py", str(shelf.root), str(expected), ranks=2)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert result.stdout.count("same: ") == 6


def test_a_run_leaves_rows_and_records(
    shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first step, at the interval, after the last; once each, also when resumed."""
    train = {"eval_interval": 2}
    settings: dict[str, Any] = {"train": train, "checkpoint": {"interval": 2}}
    run = loop.prepare(evaluated_config(shelf, tmp_path, steps=3, **settings))
    loop.train(run)
    # A crash after the last checkpoint: what came after it is measured again.
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2\n")
    before = metric_rows(tmp_path)
    loop.train(loop.prepare(evaluated_config(shelf, tmp_path, steps=3, **settings)))
    rows = metric_rows(tmp_path, with_times=True)
    evaluations = [row for row in rows if "loss" not in row]
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 3]
    assert [row["step"] for row in evaluations] == [0, 2, 3]
    assert all(row["eval/time_s"] > 0 for row in evaluations)
    assert metric_rows(tmp_path) == before
    lines = (tmp_path / "evaluation.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record.pop("step") for record in records] == [0, 2, 3]
    for row, record in zip(evaluations, records, strict=True):
        numbers = {f"eval/{key}": value for key, value in flat_numbers(record).items()}
        assert row == {"step": row["step"], "eval/time_s": row["eval/time_s"], **numbers}
        assert len(record["retrieval"]) == 12
    # The policy has learned something else than its base.
    assert evaluations[0]["eval/nll/0-120"] > evaluations[2]["eval/nll/0-120"]
    said = capsys.readouterr().out
    assert "evaluation at step 2  retrieval/360 " in said
    assert "24 questions about long texts, 3 documents of 500 tokens, 24 short prompts" in said


def test_a_cached_reference_is_asked_once_for_retention(shelf: Shelf, tmp_path: Path) -> None:
    config = evaluated_config(shelf, tmp_path)
    retention = replace(config.evaluation, retrieval=None, nll=None)
    records = []
    for mode in ("online", "cached"):
        cache = str(tmp_path / "cache") if mode == "cached" else None
        reference = replace(config.reference, mode=mode, cache_path=cache)
        changed = replace(config, reference=reference, evaluation=retention)
        if mode == "cached":
            reference_pass.compute(changed)
        run = loop.prepare(changed)
        # The budget of training may be any, whatever the base was asked in.
        budgets = [run.budget_tokens, 100, 10**6]
        records += [run.evaluation.run(run.model, budget_tokens=budget)[1] for budget in budgets]
    for record in records[1:]:
        assert_same_record(record, records[0])


def test_a_base_with_other_tokens_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    config = evaluated_config(shelf, tmp_path)
    other = shelf.hf_folder(replace(MODEL, vocab_size=400))
    reference = replace(config.reference, mode="none", hf_path=other)
    with pytest.raises(UserError, match=r"its vocabulary has 400 tokens, the policy's 300; evalua"):
        loop.prepare(replace(config, reference=reference))


def test_adapters_leave_with_the_base(shelf: Shelf, tmp_path: Path) -> None:
    """The policy without its adapters is the reference; with them it is another model."""
    case = replace(EVALUATED, name="evaluated-lora", lora=LORA, rope_theta=None)
    favour_digits(shelf.hf_folder(MODEL))
    evaluation = replace(evaluation_config(shelf.root), retrieval=None, nll=None)
    run = loop.prepare(short_config(shelf, tmp_path, case=case, evaluation=evaluation))
    assert run.sources.shares_weights and run.evaluation.base is None

    def retention() -> dict[str, Any]:
        _, record = run.evaluation.run(run.model, budget_tokens=run.budget_tokens)
        found: dict[str, Any] = record["retention"]
        return found

    at_first = retention()
    assert at_first["kl"] == pytest.approx(0, abs=1e-9) and at_first["agreement"] == 1
    write_b(run)
    expected = oracle_record(
        shelf.oracle_policy(case), shelf.oracle_reference(case), run.evaluation.suite
    )
    assert expected["retention"]["kl"] > 1e-3
    assert_same_record({"retention": retention()}, expected)
