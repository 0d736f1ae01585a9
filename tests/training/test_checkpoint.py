"""A run that was stopped and resumed is, bit for bit, the run that was not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints_convert.hf_to_megatron import run_import
from checkpoints_convert.megatron_to_hf import run_export
from checkpoints_convert.torch_dist import TRACKER_NAME
from megatron_longpo.config.convert import ExportConfig, ImportConfig
from megatron_longpo.config.train import TrainConfig
from megatron_longpo.errors import StopRequested, UserError
from megatron_longpo.model.spec import DTYPES
from megatron_longpo.runtime import stop
from megatron_longpo.training import checkpoint, loop
from tests.parity.cases import TinyModel
from tests.parity.harness import Shelf, load_hf, policy_parameters
from tests.training.short_runs import CASE, NUM_PAIRS, POLICY, metric_rows, short_config

pytestmark = pytest.mark.usefixtures("single_process", "own_signal_handlers")


def run_to_end(config: TrainConfig) -> loop.Run:
    run = loop.prepare(config)
    loop.train(run)
    return run


def run_until_stopped(config: TrainConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> loop.Run:
    """Runs until a signal comes in during `step`."""
    run = loop.prepare(config)
    with monkeypatch.context() as patch:
        patch.setattr(stop, "was_requested", lambda: run.step == step)
        with pytest.raises(StopRequested, match=rf"stopped at step {step} of \d+, .* saved"):
            loop.train(run)
    return run


def square_average_dtypes(run: loop.Run) -> set[torch.dtype]:
    parts = getattr(run.optimizer, "chained_optimizers", [run.optimizer])
    return {state["exp_avg_sq"].dtype for part in parts for state in part.optimizer.state.values()}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_bitwise(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize(
    ("name", "distributed", "dtype", "state_dtype"),
    [
        ("rmsprop", True, "fp32", "fp32"),
        ("rmsprop", False, "fp32", "bf16"),
        ("adam", True, "fp32", "fp32"),
        ("adam", False, "fp32", "fp32"),
        ("rmsprop", True, "bf16", "bf16"),
        ("adam", False, "bf16", "fp32"),
    ],
)
def test_stopped_and_resumed_is_the_same_run(
    name: str,
    distributed: bool,
    dtype: str,
    state_dtype: str,
    shelf: Shelf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def config(folder: str) -> TrainConfig:
        return short_config(
            shelf,
            tmp_path / folder,
            steps=5,
            case=replace(CASE, dtype=dtype),  # type: ignore[arg-type]
            optimizer={
                "name": name,
                "distributed": distributed,
                "weight_decay": 0.01,
                "state_dtype": state_dtype,
            },
        )

    straight = run_to_end(config("straight"))
    expected_rows = metric_rows(tmp_path / "straight")
    assert [row["step"] for row in expected_rows] == [1, 2, 3, 4, 5]
    # Warm-up, the top and two steps down: a schedule that began again would show.
    assert len({row["learning_rate"] for row in expected_rows}) == 5

    run_until_stopped(config("resumed"), 2, monkeypatch)
    assert checkpoints(tmp_path / "resumed") == ["iter_0000002", TRACKER_NAME]
    resumed = loop.prepare(config("resumed"))
    assert resumed.step == 2
    assert square_average_dtypes(resumed) == {DTYPES[state_dtype]}
    loop.train(resumed)
    assert metric_rows(tmp_path / "resumed") == expected_rows
    assert_bitwise(policy_parameters(resumed), policy_parameters(straight))


def test_a_crash_between_checkpoints_loses_only_their_steps(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows behind the checkpoint go, a half line goes, a folder half written does not count."""
    run_to_end(short_config(shelf, tmp_path / "straight"))
    config = short_config(shelf, tmp_path / "crashed", checkpoint={"interval": 2})
    run_until_stopped(config, 3, monkeypatch)
    folder = tmp_path / "crashed" / "checkpoints"
    # As if the third step's checkpoint had not been finished.
    (folder / "iter_0000003").rename(folder / "iter_0000003.writing")
    (folder / TRACKER_NAME).write_text("2\n")
    with (tmp_path / "crashed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss"')
    resumed = loop.prepare(config)
    assert resumed.step == 2
    loop.train(resumed)
    assert metric_rows(tmp_path / "crashed") == metric_rows(tmp_path / "straight")
    assert not list(folder.glob("*.writing"))


def test_a_crash_while_saving_leaves_a_checkpoint(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails, the tracker names a whole checkpoint, and the next run goes on from it."""
    run_to_end(short_config(shelf, tmp_path, steps=2))
    config = short_config(shelf, tmp_path, steps=3)
    rename = Path.rename

    def crash(*arguments: Any, **settings: Any) -> None:
        raise OSError("no space left on device")

    def rename_all_but_the_folder(path: Path, target: Path) -> Path:
        if path.suffix == ".writing":
            crash()
        return rename(path, target)

    for module, function, failing, saved in (
        (checkpoint.dist_checkpointing, "save", crash, 2),
        (checkpoint, "write_hf_side_files", crash, 2),
        (Path, "rename", rename_all_but_the_folder, 2),
        (checkpoint, "_prune", crash, 3),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, function, failing)
            with pytest.raises(OSError, match="no space left"):
                run_to_end(config)
        assert loop.prepare(config).step == saved, function


def test_checkpoints_are_saved_when_due_and_the_oldest_go(shelf: Shelf, tmp_path: Path) -> None:
    run_to_end(short_config(shelf, tmp_path, steps=3, checkpoint={"interval": 1, "keep": 2}))
    assert checkpoints(tmp_path) == ["iter_0000002", "iter_0000003", TRACKER_NAME]
    assert (tmp_path / "checkpoints" / TRACKER_NAME).read_text() == "3\n"
    progress = json.loads((tmp_path / "checkpoints/iter_0000003/progress.json").read_text())
    assert progress["step"] == 3 and progress["sampler"]["consumed_pairs"] == 9
    assert "torch" in progress["versions"]


def test_a_new_checkpoint_stays_beside_later_steps_of_an_abandoned_run(
    shelf: Shelf, tmp_path: Path
) -> None:
    run_to_end(short_config(shelf, tmp_path, checkpoint={"interval": 1, "keep": 3}))
    source = tmp_path / "checkpoints" / "iter_0000002"
    again = {"resume": str(source), "keep": 1}
    run = run_to_end(short_config(shelf, tmp_path, steps=3, checkpoint=again))
    assert checkpoints(tmp_path) == ["iter_0000003", TRACKER_NAME]
    config = short_config(shelf, tmp_path, steps=3)
    assert_bitwise(policy_parameters(loop.prepare(config)), policy_parameters(run))


def test_a_finished_run_has_nothing_left_to_do(shelf: Shelf, tmp_path: Path) -> None:
    config = short_config(shelf, tmp_path, steps=2)
    finished = run_to_end(config)
    rows = (tmp_path / "metrics.jsonl").read_text()
    again = run_to_end(config)
    assert again.step == 2 and (tmp_path / "metrics.jsonl").read_text() == rows
    assert_bitwise(policy_parameters(again), policy_parameters(finished))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_starts_from_an_import(dtype: Any, shelf: Shelf, tmp_path: Path) -> None:
    """`checkpoint.resume` may name an imported checkpoint; its weights replace those of hf_path."""
    other = shelf.hf_folder(replace(POLICY, seed=9))
    imported = str(tmp_path / "imported")
    run_import(ImportConfig(source=other, destination=imported, dtype=dtype))
    config = short_config(
        shelf,
        tmp_path / "run",
        case=replace(CASE, dtype=dtype),
        steps=2,
        optimizer={"warmup_ratio": 0.0, "lr": 1e-3},
        checkpoint={"resume": imported},
    )
    run = loop.prepare(config)
    assert run.step == 0 and run.sampler.state.consumed_pairs == 0
    torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
    expected = {
        name: parameter.detach().to(torch_dtype).float()
        for name, parameter in load_hf(other).named_parameters()
    }
    assert_bitwise(policy_parameters(run), expected)
    # The optimizer's own copy of the weights must be these too, or the first step undoes it all.
    loop.train(run)
    for name, after in policy_parameters(run).items():
        assert 0 < float((after - expected[name]).abs().max()) < 0.05, name
    assert [row["step"] for row in metric_rows(tmp_path / "run")] == [1, 2]


def test_a_checkpoint_is_where_another_run_starts(shelf: Shelf, tmp_path: Path) -> None:
    first = run_to_end(short_config(shelf, tmp_path / "first", checkpoint={"interval": 2}))
    straight = policy_parameters(first)
    source = tmp_path / "first" / "checkpoints" / "iter_0000002"
    config = short_config(shelf, tmp_path / "second", checkpoint={"resume": str(source)})
    assert_bitwise(policy_parameters(run_to_end(config)), straight)
    assert [row["step"] for row in metric_rows(tmp_path / "second")] == [3, 4]

    config = short_config(
        shelf,
        tmp_path / "third",
        checkpoint={"resume": str(source), "load_optimizer": False},
    )
    without = run_to_end(config)
    assert metric_rows(tmp_path / "third")[0]["loss"] == metric_rows(tmp_path / "second")[0]["loss"]
    assert not torch.equal(
        policy_parameters(without)["model.norm.weight"], straight["model.norm.weight"]
    )


def test_an_exported_checkpoint_is_the_trained_policy(shelf: Shelf, tmp_path: Path) -> None:
    run = run_to_end(short_config(shelf, tmp_path / "run", steps=2))
    source = str(tmp_path / "run" / "checkpoints")
    run_export(ExportConfig(source=source, destination=str(tmp_path / "hf")))
    exported = load_hf(str(tmp_path / "hf"))
    assert_bitwise(
        {name: p.detach() for name, p in exported.named_parameters()}, policy_parameters(run)
    )
    assert exported.config.rope_parameters["rope_theta"] == CASE.rope_theta
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 2}, "its model has num_layers 1, model.hf_path has 2"),
        ({"family": "llama"}, "its model has family qwen2, model.hf_path has llama"),
        ({"vocab_size": 320}, "its model has vocab_size 300, model.hf_path has 320"),
        ({"head_dim": 16}, "its model has head_dim 8, model.hf_path has 16"),
        ({"tied": True}, "its model has tied_embeddings False, model.hf_path has True"),
    ],
)
def test_another_models_checkpoint_is_refused(
    change: dict[str, Any], message: str, shelf: Shelf, tmp_path: Path
) -> None:
    run_import(
        ImportConfig(source=shelf.hf_folder(POLICY), destination=str(tmp_path / "checkpoints"))
    )
    other: TinyModel = replace(POLICY, **change)
    config = short_config(shelf, tmp_path, case=replace(CASE, policy=other))
    with pytest.raises(UserError, match=message) as error:
        loop.prepare(config)
    assert "\n" not in str(error.value)


def test_other_data_are_refused_on_resume(shelf: Shelf, tmp_path: Path) -> None:
    run_to_end(short_config(shelf, tmp_path, steps=1))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"seed": 1}, r"data\.seed is 1, but the checkpoint was saved with 42"),
        ({"shuffle": False}, r"data\.shuffle is False"),
        ({"max_length": 50, "too_long": "drop"}, rf"usable pairs\) is \d, .* with {NUM_PAIRS}"),
    ]
    for data, message in changes:
        with pytest.raises(UserError, match=message):
            loop.prepare(short_config(shelf, tmp_path, steps=2, data=data))


def test_a_place_without_a_checkpoint_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    config = short_config(shelf, tmp_path, checkpoint={"resume": str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match="nowhere: no torch_dist checkpoint here"):
        loop.prepare(config)
    run_to_end(short_config(shelf, tmp_path / "run", steps=1))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "iter_0000001")
    with pytest.raises(UserError, match="iter_0000001: no torch_dist checkpoint here"):
        loop.prepare(short_config(shelf, tmp_path / "run", steps=2))


def test_damaged_progress_is_named(shelf: Shelf, tmp_path: Path) -> None:
    run_to_end(short_config(shelf, tmp_path, steps=1))
    path = tmp_path / "checkpoints" / "iter_0000001" / checkpoint.PROGRESS_NAME
    path.write_text('{"step": 1')
    with pytest.raises(UserError, match=r"progress\.json: not a training checkpoint's progress"):
        loop.prepare(short_config(shelf, tmp_path, steps=2))


def test_without_checkpoints_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "missing") is None


def test_a_signal_before_the_first_step_stops_without_a_checkpoint(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = loop.prepare(short_config(shelf, tmp_path))
    monkeypatch.setattr(stop, "was_requested", lambda: True)
    with pytest.raises(StopRequested, match="stopped before step 1, nothing new to save"):
        loop.train(run)
    assert not (tmp_path / "checkpoints").exists()


def test_its_own_checkpoint_wins_over_the_path_it_started_from(
    shelf: Shelf, tmp_path: Path
) -> None:
    run_to_end(short_config(shelf, tmp_path / "first", steps=2))
    first = str(tmp_path / "first" / "checkpoints")
    again = short_config(shelf, tmp_path / "second", steps=4, checkpoint={"resume": first})
    assert loop.prepare(again).step == 2
    run_to_end(again)
    assert loop.prepare(again).step == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "adam"}, r"optimizer\.name \(adam\): .* was saved with rmsprop"),
        ({"distributed": False}, r"optimizer\.distributed \(False\): .* was saved with True"),
    ],
)
def test_another_optimizers_state_is_refused(
    shelf: Shelf, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    run_to_end(short_config(shelf, tmp_path, steps=2))
    config = short_config(shelf, tmp_path, optimizer=changed)
    with pytest.raises(UserError, match=message):
        loop.prepare(config)
    without = short_config(shelf, tmp_path, optimizer=changed, checkpoint={"load_optimizer": False})
    assert loop.prepare(without).step == 2


def test_a_run_goes_on_with_its_averages_in_another_type(shelf: Shelf, tmp_path: Path) -> None:
    def run(folder: str, steps: int, state_dtype: str) -> loop.Run:
        steady = {"lr_schedule": "constant", "warmup_ratio": 0.0, "state_dtype": state_dtype}
        return run_to_end(short_config(shelf, tmp_path / folder, steps=steps, optimizer=steady))

    run("run", 2, "fp32")
    assert square_average_dtypes(run("run", 3, "bf16")) == {torch.bfloat16}
    assert square_average_dtypes(run("run", 4, "fp32")) == {torch.float32}
    run("straight", 4, "fp32")
    last, expected = (metric_rows(tmp_path / folder)[-1]["loss"] for folder in ("run", "straight"))
    assert last == pytest.approx(expected, rel=1e-3)


def test_other_rows_in_equal_number_are_refused(shelf: Shelf, tmp_path: Path) -> None:
    run_to_end(short_config(shelf, tmp_path, steps=2))
    rows = tmp_path / "other.jsonl"
    lines = Path(shelf.rows_file(CASE)).read_text(encoding="utf-8").splitlines()
    rows.write_text("".join(line + "\n" for line in reversed(lines)), encoding="utf-8")
    config = short_config(shelf, tmp_path, data={"path": str(rows)})
    with pytest.raises(UserError, match=r"data\.path \(fingerprint of its rows\) is"):
        loop.prepare(config)
