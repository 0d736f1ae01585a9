"""`longpo reference` and training on what it left, in one process."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.utils import unwrap_model
from safetensors.torch import load_file, save_file

from megatron_longpo.config.train import (
    LoraConfig,
    ObjectiveConfig,
    ReferenceConfig,
    TrainConfig,
    resolve,
)
from megatron_longpo.data.rows.writing import write_rows_jsonl
from megatron_longpo.engine import batches
from megatron_longpo.engine.flops import step_flops
from megatron_longpo.engine.reference_cache import part_paths
from megatron_longpo.errors import StopRequested, UserError
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.reference import run as reference_pass
from megatron_longpo.runtime import stop
from megatron_longpo.training import loop
from tests.parity.cases import RowShape
from tests.parity.harness import Shelf
from tests.reference.cached_runs import (
    CACHED_OBJECTIVES,
    assert_same_metrics,
    cached_config,
    case_of,
    compute,
    in_mode_cached,
    train,
)
from tests.training.short_runs import CASE, NUM_PAIRS, metric_rows, short_config

pytestmark = pytest.mark.usefixtures("single_process", "own_signal_handlers")


@pytest.mark.parametrize("name", list(CACHED_OBJECTIVES))
def test_cached_and_online_give_the_same_metrics(name: str, shelf: Shelf, tmp_path: Path) -> None:
    """Two epochs, shuffled, with evaluation; the same settings but for the mode."""
    case = case_of(name)
    data = {"eval_path": shelf.rows_file(CASE)}
    online = short_config(shelf, tmp_path / "online", case=case, data=data)
    cached = cached_config(shelf, tmp_path / "cached", case=case, data=data)
    compute(cached)
    train(online)
    run = train(cached)
    assert_same_metrics(tmp_path / "cached", tmp_path / "online")
    # One model: no reference beside the policy, and none of its work counted.
    (model,) = run.model
    assert unwrap_model(model).reference is None
    assert run.sources.online_arch is None
    steps = [row for row in metric_rows(tmp_path / "cached", with_times=True) if "loss" in row]
    assert all(math.isfinite(row["reference_logps/chosen"]) for row in steps)
    policy_alone = step_flops(run.pairs.sizes, run.sources.policy, None)
    assert run.sources.reference is not None
    arch = run.sources.reference.arch
    assert step_flops(run.pairs.sizes, run.sources.policy, arch) == policy_alone


def test_rows_that_are_dropped_or_cut_and_ids_that_repeat(shelf: Shelf, tmp_path: Path) -> None:
    rows = replace(
        CASE,
        name="cached-long",
        shapes=(RowShape(prompt_length=90), *CASE.shapes[:4], RowShape(prompt_length=80)),
    ).rows
    path = tmp_path / "rows.jsonl"
    write_rows_jsonl(path, [replace(row, id="same") for row in rows])
    for too_long, max_length in (("drop", 85), ("truncate_document", 70)):
        data = {"path": str(path), "too_long": too_long, "max_length": max_length}
        folders = [tmp_path / f"{mode}-{too_long}" for mode in ("online", "cached")]
        dpo = case_of("dpo")
        configs = [
            short_config(shelf, folders[0], case=dpo, data=data, train={"global_batch_pairs": 2}),
            cached_config(shelf, folders[1], case=dpo, data=data, train={"global_batch_pairs": 2}),
        ]
        compute(configs[1])
        runs = [train(config) for config in configs]
        assert_same_metrics(folders[1], folders[0])
        assert runs[1].pairs.num_dropped == runs[0].pairs.num_dropped


def test_a_cached_run_resumes(shelf: Shelf, tmp_path: Path) -> None:
    whole = cached_config(shelf, tmp_path / "whole", tmp_path / "cache", steps=4)
    compute(whole)
    train(whole)
    settings = {"steps": 4, "checkpoint": {"interval": 2}}
    broken = cached_config(shelf, tmp_path / "broken", tmp_path / "cache", **settings)
    run = loop.prepare(broken)
    loop.train(replace_steps(run, 2))
    run = loop.prepare(broken)
    assert run.step == 2
    loop.train(run)
    assert metric_rows(tmp_path / "broken") == metric_rows(tmp_path / "whole")


def replace_steps(run: loop.Run, num_steps: int) -> loop.Run:
    """The run, ending early."""
    run.num_steps = num_steps
    return run


# Refused


Change = Callable[[TrainConfig, Path], TrainConfig]


def change_weight(config: TrainConfig, folder: Path) -> TrainConfig:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    return config


def change_theta(config: TrainConfig, folder: Path) -> TrainConfig:
    path = folder / "config.json"
    contents = json.loads(path.read_text())
    contents["rope_parameters"]["rope_theta"] = 20000.0
    path.write_text(json.dumps(contents))
    return config


def change_tokenizer(config: TrainConfig, folder: Path) -> TrainConfig:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    return config


def change_row(config: TrainConfig, folder: Path) -> TrainConfig:
    path = Path(config.data.path)
    first, *others = path.read_text().splitlines()
    row = json.loads(first)
    row["ref_chosen_input_ids"][0][0] ^= 1
    path.write_text("\n".join([json.dumps(row), *others]) + "\n")
    return config


def change_length(config: TrainConfig, folder: Path) -> TrainConfig:
    return resolve(replace(config, data=replace(config.data, max_length=1999)))


def change_dtype(config: TrainConfig, folder: Path) -> TrainConfig:
    return resolve(replace(config, model=replace(config.model, dtype="bf16")))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_weight, "other weights (model.safetensors);"),
        (change_theta, "other config (rope.theta 10000.0, now 20000.0);"),
        (change_tokenizer, "other tokenizer (tokenizer.json);"),
        (change_row, "other rows (data.path);"),
        (change_length, "other settings (data.max_length 2000, now 1999);"),
        (change_dtype, "other settings (model.dtype fp32, now bf16);"),
    ],
)
def test_a_change_refuses_the_cache_and_is_named(
    change: Change, named: str, shelf: Shelf, tmp_path: Path
) -> None:
    config = own_copies(cached_config(shelf, tmp_path / "run"), tmp_path)
    compute(config)
    loop.prepare(config)
    assert config.reference.hf_path is not None
    changed = change(config, Path(config.reference.hf_path))
    with pytest.raises(UserError) as caught:
        loop.prepare(changed)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"reference.cache_path ({tmp_path / 'run' / 'reference_logps'}): ")
    assert named in message
    assert "make it anew with `longpo reference`" in message
    # As the message says; the old cache stays, for who goes back.
    compute(changed)
    loop.prepare(changed)
    if change in (change_length, change_dtype):
        loop.prepare(config)


def own_copies(config: TrainConfig, folder: Path) -> TrainConfig:
    """The settings with a reference and rows that may be changed."""
    assert config.reference.hf_path is not None
    model, rows = folder / "reference", folder / "rows.jsonl"
    shutil.copytree(config.reference.hf_path, model)
    shutil.copyfile(config.data.path, rows)
    return resolve(
        replace(
            config,
            reference=replace(config.reference, hf_path=str(model)),
            data=replace(config.data, path=str(rows)),
        )
    )


def test_nothing_computed_yet(shelf: Shelf, tmp_path: Path) -> None:
    config = cached_config(shelf, tmp_path)
    with pytest.raises(UserError, match="holds no reference log-probabilities yet; make it with"):
        loop.prepare(config)


def test_a_cache_of_more_serves_and_one_of_less_does_not(shelf: Shelf, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    longpo = cached_config(shelf, tmp_path / "a", cache, case=replace(CASE, name="cached-longpo"))
    compute(longpo)
    rows = shelf.rows_file(replace(CASE, name="cached-longpo"))
    solopo = cached_config(
        shelf, tmp_path / "b", cache, case=case_of("solopo_dpo"), data={"path": rows}
    )
    with pytest.raises(UserError, match="has no sums of long_chosen, which this objective needs"):
        loop.prepare(solopo)
    compute(solopo)
    shutil.rmtree(cache / folder_with(cache, rows=["short_chosen", "short_rejected"]))
    run = loop.prepare(longpo)
    assert run.pairs.reference_logps is not None
    assert len(run.pairs.reference_logps.sums) == 3
    loop.train(run)
    short_config_ = short_config(shelf, tmp_path / "online", data={"path": rows})
    train(short_config_)
    assert_same_metrics(tmp_path / "a", tmp_path / "online")


def folder_with(cache: Path, *, rows: list[str]) -> str:
    (found,) = (
        path.parent.name
        for path in cache.glob("*/cache.json")
        if json.loads(path.read_text())["rows"] == rows
    )
    return found


# Going on


def test_it_goes_on_with_what_is_there(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after two parts, one of them torn afterwards: only what is missing is scored."""
    monkeypatch.setattr(batches, "MICROBATCHES_A_PART", 1)
    config = cached_config(shelf, tmp_path)
    scored: list[list[int]] = []
    original = reference_pass.score_part

    def recorded(task: reference_pass.Task, pairs: list[int], *others: Any) -> Any:
        scored.append(pairs)
        monkeypatch.setattr(stop, "_was_requested", len(scored) == 2)
        return original(task, pairs, *others)

    monkeypatch.setattr(reference_pass, "score_part", recorded)
    with pytest.raises(StopRequested, match=rf"stopped with 8 of {NUM_PAIRS} rows scored"):
        compute(config)
    with pytest.raises(UserError, match=r"is not among the \d+ rows in .*resumes where it stopped"):
        loop.prepare(config)
    (folder,) = (tmp_path / "reference_logps").iterdir()
    torn, _ = part_paths(folder)
    torn.write_bytes(torn.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"part-000000.npz: damaged \("):
        loop.prepare(config)
    monkeypatch.setattr(stop, "_was_requested", False)
    compute(config)
    assert sorted(chain(*scored[2:])) == sorted({*range(NUM_PAIRS)} - {*scored[1]})
    # A third time there is nothing to do, and no model is built.
    monkeypatch.setattr(reference_pass.build, "build_alone", None)
    compute(config)
    run = loop.prepare(config)
    assert run.pairs.reference_logps is not None
    assert run.pairs.reference_logps.indices.tolist() == list(range(NUM_PAIRS))


def test_a_reference_without_numbers_is_a_fault(shelf: Shelf, tmp_path: Path) -> None:
    config = own_copies(cached_config(shelf, tmp_path / "run"), tmp_path)
    assert config.reference.hf_path is not None
    path = Path(config.reference.hf_path) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][:] = 3e38
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FloatingPointError, match=r"the reference gives row 'pair0' .* no number"):
        compute(config)


def test_dry_run_writes_nothing(
    shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compute(cached_config(shelf, tmp_path / "run", train={"dry_run": True}))
    assert "dry run: settings and data are in order" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


# Parts


def test_parts_are_consecutive_and_full() -> None:
    assert batches.cut([0, 2, 3, 4], [5, 5, 11, 1], part_tokens=10) == [[0, 2], [3], [4]]
    assert batches.cut([], [], part_tokens=10) == []


def test_microbatches_hold_as_much_as_training_ones(shelf: Shelf, tmp_path: Path) -> None:
    """The budget is training's, so short rows are scored many at a time."""
    config = cached_config(shelf, tmp_path)
    compute(config)
    run = loop.prepare(config)
    task = reference_pass.Task(catalog=run.pairs, writer=None, pending=())
    assert task.budget_tokens == run.budget_tokens


# Offload


@pytest.mark.parametrize("name", ["longpo", "opsdl"])
def test_offloading_changes_no_bit(
    name: str, shelf: Shelf, tmp_path: Path, single_process: Groups
) -> None:
    case = replace(CASE, name="offload", objective=ObjectiveConfig(name=name))  # type: ignore[arg-type]
    online = short_config(shelf, tmp_path / "there", case=case)
    away = short_config(shelf, tmp_path / "away", case=case)
    away = resolve(replace(away, reference=replace(away.reference, offload=True)))
    train(online)
    run = train(away)
    assert metric_rows(tmp_path / "away") == metric_rows(tmp_path / "there")
    assert unwrap_model(run.model[0])._offloaded is not None


def test_adapters_train_on_a_cache_and_refuse_to_offload_what_they_share(
    shelf: Shelf, tmp_path: Path
) -> None:
    case = replace(CASE, name="cached-lora", reference=CASE.policy)
    lora = LoraConfig(rank=2)
    online = replace(short_config(shelf, tmp_path / "online", case=case), lora=lora)
    cached = replace(cached_config(shelf, tmp_path / "cached", case=case), lora=lora)
    compute(cached)
    train(online)
    train(cached)
    assert_same_metrics(tmp_path / "cached", tmp_path / "online")
    away = replace(online, reference=replace(online.reference, offload=True))
    with pytest.raises(UserError, match=r"reference.offload \(true\): with lora the reference is"):
        loop.prepare(away)


def test_offload_settings_do_not_stop_the_reference_command(shelf: Shelf, tmp_path: Path) -> None:
    """The settings of an online run serve `longpo reference` as they are."""
    online = short_config(shelf, tmp_path)
    online = resolve(replace(online, reference=replace(online.reference, offload=True)))
    compute(online)
    loop.prepare(in_mode_cached(online))
    with pytest.raises(UserError, match=r"reference.mode \(none\): longpo reference has nothing"):
        compute(replace(online, reference=ReferenceConfig(mode="none")))


def test_sums_are_those_of_the_oracle(shelf: Shelf, tmp_path: Path) -> None:
    """Straight from transformers: a turn's answer tokens under the short row's context."""
    config = cached_config(shelf, tmp_path)
    compute(config)
    logps = loop.prepare(config).pairs.reference_logps
    assert logps is not None
    model = shelf.oracle_reference(CASE)
    assert model is not None
    expected = []
    for row in CASE.rows:
        for tokens in row.reference_chosen:
            ids = torch.tensor(tokens.input_ids)[None]
            with torch.no_grad():
                scores = model(ids).logits[0, :-1].double().log_softmax(-1)
            is_answer = torch.tensor(tokens.labels[1:]) >= 0
            picked = scores.gather(1, ids[0, 1:, None]).squeeze(1)
            expected.append(float(picked[is_answer].sum()))
    np.testing.assert_allclose(logps.sums["short_chosen"], expected, rtol=1e-5)
