"""A run from its settings to what it leaves behind."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.core.utils import unwrap_model

from megatron_longpo.config.train import ObjectiveConfig
from megatron_longpo.data.rows.dataset import open_rows
from megatron_longpo.data.trees.tree import TreeConfig
from megatron_longpo.engine.flops import step_flops
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.training import loop
from tests.oracle import oracle_step
from tests.parity.cases import RowShape
from tests.parity.harness import Shelf, oracle_settings, policy_parameters
from tests.training.short_runs import CASE, NUM_PAIRS, TIMES, metric_rows, short_config

pytestmark = pytest.mark.usefixtures("single_process", "own_signal_handlers")

STEP_KEYS = {
    *("step", "loss", "preference_loss", "nll_loss", "grad_norm", "learning_rate"),
    *("consumed_pairs", "logps/chosen", "logps/rejected", "reference_logps/chosen"),
    *("reference_logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/accuracies"),
    *("rewards/margins", "tokens", "unshared_tokens", "reference_tokens", *TIMES[:4]),
}
"""Those of contract.md section 5."""


def train(config: Any) -> loop.Run:
    run = loop.prepare(config)
    loop.train(run)
    return run


def test_a_run_leaves_its_config_and_a_row_a_step(
    shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = short_config(shelf, tmp_path, steps=None, logging={"interval": 2})
    run = train(config)
    rows = metric_rows(tmp_path, with_times=True)
    # One epoch of ten pairs, three a step; the tenth is left out.
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["consumed_pairs"] for row in rows] == [3, 6, 9]
    assert all(set(row) == STEP_KEYS for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[0]["learning_rate"] == 0 < rows[1]["learning_rate"]
    said = capsys.readouterr().out
    assert "the last 1 pairs of each epoch's order are left out" in said
    # The interval paces the console alone; the last step is always said.
    assert [f"step {step}/3" in said for step in (1, 2, 3)] == [False, True, True]
    contents = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert contents["fingerprints"]["data"] == run.pairs.dataset.fingerprint
    assert contents["train"]["global_batch_pairs"] == 3


def test_work_is_counted_from_the_rows(shelf: Shelf, tmp_path: Path) -> None:
    batch = NUM_PAIRS
    config = short_config(shelf, tmp_path, steps=1, train={"global_batch_pairs": batch})
    run = train(config)
    (row,) = metric_rows(tmp_path, with_times=True)
    rows = CASE.rows

    def shared(one: Any, other: Any) -> int:
        ids = zip(one.input_ids, other.input_ids, strict=False)
        return next((i for i, (a, b) in enumerate(ids) if a != b), min(len(one), len(other)))

    unshared = sum(len(pair.chosen) + len(pair.rejected) for pair in rows)
    assert row["unshared_tokens"] == unshared
    assert row["tokens"] == unshared - sum(shared(pair.chosen, pair.rejected) for pair in rows)
    turns = [
        both
        for pair in rows
        for both in zip(pair.reference_chosen, pair.reference_rejected, strict=True)
    ]
    assert row["reference_tokens"] == sum(
        len(chosen) + len(rejected) - shared(chosen, rejected) for chosen, rejected in turns
    )
    flops = step_flops(run.pairs.sizes, run.sources.policy, run.sources.online_arch)
    assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["step_time_s"])
    assert row["model_tflops_per_gpu"] == pytest.approx(flops / row["step_time_s"] / 1e12)
    # A process with torch in it has hundreds of MiB, and this machine not thousands of GiB.
    assert 0.05 < row["peak_memory_gib"] < 1000


@pytest.mark.parametrize("at_start", [True, False])
def test_evaluation_scores_every_row_once(at_start: bool, shelf: Shelf, tmp_path: Path) -> None:
    """Ten rows in batches of three: the last one is smaller and counts as much a pair."""
    config = short_config(
        shelf,
        tmp_path,
        steps=3,
        data={"eval_path": shelf.rows_file(CASE)},
        train={"eval_interval": 2, "eval_at_start": at_start},
    )
    run = train(config)
    rows = metric_rows(tmp_path)
    evaluations = [row for row in rows if "loss" not in row]
    assert [row["step"] for row in evaluations] == ([0, 2, 3] if at_start else [2])
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert all(key == "step" or key.startswith("eval/") for row in evaluations for key in row)
    if at_start:
        oracle = oracle_step(
            shelf.oracle_policy(CASE),
            shelf.oracle_reference(CASE),
            CASE.rows,
            **oracle_settings(config),
        )
        for key in ("loss", "nll_loss", "preference_loss", "logps/rejected"):
            actual = evaluations[0][f"eval/{key}"]
            assert actual == pytest.approx(oracle.metrics[key], rel=1e-5), key
        last = {key: value for key, value in evaluations[-1].items() if key != "step"}
        metrics, record = run.evaluation.run(run.model, budget_tokens=run.budget_tokens)
        assert metrics.pop("eval/time_s") > 0
        assert last == metrics and not record
        assert last["eval/loss"] < evaluations[0]["eval/loss"]


def test_evaluating_changes_nothing(shelf: Shelf, tmp_path: Path) -> None:
    plain = train(short_config(shelf, tmp_path / "plain"))
    data = {"eval_path": shelf.rows_file(CASE)}
    config = short_config(shelf, tmp_path / "evaluated", data=data, train={"eval_interval": 1})
    evaluated = train(config)
    steps = [row for row in metric_rows(tmp_path / "evaluated") if "loss" in row]
    assert steps == metric_rows(tmp_path / "plain")
    for name, tensor in policy_parameters(plain).items():
        assert torch.equal(policy_parameters(evaluated)[name], tensor)


def test_evaluation_rows_may_be_longer_than_the_budget(shelf: Shelf, tmp_path: Path) -> None:
    long_rows = replace(CASE, name="long_rows", shapes=(RowShape(prompt_length=200), RowShape()))
    data = {"eval_path": shelf.rows_file(long_rows)}
    run = loop.prepare(short_config(shelf, tmp_path, data=data))
    pairs = run.evaluation.pairs
    assert pairs is not None
    assert run.budget_tokens < pairs.largest_pair_tokens == 200 + 5 + 4
    oracle = oracle_step(
        shelf.oracle_policy(CASE),
        shelf.oracle_reference(CASE),
        long_rows.rows,
        **oracle_settings(run.config),
    )
    metrics, _ = run.evaluation.run(run.model, budget_tokens=run.budget_tokens)
    assert metrics["eval/loss"] == pytest.approx(oracle.loss, rel=1e-5)


def test_dry_run_checks_and_leaves_nothing(
    shelf: Shelf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(loop.process_groups, "shutdown", lambda: None)
    loop.run_training(short_config(shelf, tmp_path / "run", train={"dry_run": True}))
    assert "dry run: settings, data and model are in order" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_loss_that_is_no_number_stops_the_run(what: str, shelf: Shelf, tmp_path: Path) -> None:
    config = short_config(shelf, tmp_path, optimizer={"warmup_ratio": 0.0})
    run = loop.prepare(config)
    loop.train_step(run)
    (model,) = unwrap_model(run.model)
    weight = model.policy.decoder.final_layernorm.weight
    if what == "loss":
        weight.data.fill_(float("nan"))
    else:
        weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match=rf"the {what} of step 2 is (nan|inf); the last"):
        loop.train_step(run)
    assert run.step == 1


def test_settings_reach_the_trees(shelf: Shelf, tmp_path: Path) -> None:
    """Objective, reference and data settings decide what is computed at all."""
    sft = replace(CASE, name="sft_trees", reference=None, objective=ObjectiveConfig(name="sft"))
    run = loop.prepare(short_config(shelf, tmp_path / "sft", case=sft))
    assert run.pairs.tree_config == TreeConfig(policy=(), nll="chosen_answers", reference=())
    assert [size.reference_tokens for size in run.pairs.sizes] == [0] * NUM_PAIRS
    case = replace(
        CASE,
        name="dpo_trees",
        objective=ObjectiveConfig(name="dpo"),
    )
    run = loop.prepare(
        short_config(shelf, tmp_path / "dpo", case=case, data={"share_prefix": False})
    )
    assert run.pairs.tree_config == TreeConfig(
        nll=None, reference=("long_chosen", "long_rejected"), share_prefix=False
    )
    rows = open_rows(shelf.rows_file(case))
    longest = max(len(row.chosen) + len(row.rejected) for row in rows)
    assert run.budget_tokens == run.pairs.largest_pair_tokens == longest


def test_positions_past_the_models_are_warned_of(
    shelf: Shelf, tmp_path: Path, single_process: Groups
) -> None:
    config = short_config(shelf, tmp_path, data={"max_length": 5000})
    with pytest.warns(UserWarning, match=r"data\.max_length \(5000\) exceeds .* \(4096\) .*theta"):
        loop.prepare(replace(config, model=replace(config.model, rope_theta=None)))
