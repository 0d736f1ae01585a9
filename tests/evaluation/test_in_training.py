"""Evaluation during training equals plain transformers, and one process's on any ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.evaluation.results import flat_numbers
from megatron_longpo.training import loop
from tests.evaluation.oracle import oracle_record
from tests.evaluation.ranks import EVALUATED
from tests.evaluation.suites import assert_same_record, evaluation_config, favour_digits
from tests.parity.harness import Shelf
from tests.torchrun import torchrun
from tests.training.short_runs import short_config

pytestmark = pytest.mark.usefixtures("single_process")


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
    assert result.stdout.count("same: ") == 7
