"""metrics.jsonl after crashes and resumes, and the trackers beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.config.train import LoggingConfig, WandbConfig
from megatron_longpo.engine.metric_names import LOSS_KEYS
from megatron_longpo.engine.metrics import (
    MetricsWriter,
    check_trackers,
    keep_rows_until,
    mean_metrics,
)
from megatron_longpo.errors import UserError


def writer(folder: Path, *, resumed_step: int = 0, **settings: Any) -> MetricsWriter:
    config = LoggingConfig(**{"dir": str(folder), "tensorboard": False, **settings})
    return MetricsWriter(config, resumed_step=resumed_step, run_config={"model": {"hf_path": "x"}})


def lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


def test_rows_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    metrics = writer(folder)
    metrics.write({"step": 1, "loss": 0.5, "nll_loss": None})
    assert lines(folder) == ['{"step": 1, "loss": 0.5, "nll_loss": null}']
    metrics.write({"step": 2, "loss": 0.25}, to_trackers=False)
    assert [json.loads(line)["step"] for line in lines(folder)] == [1, 2]
    metrics.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_json_cannot_say_is_null(tmp_path: Path, value: float) -> None:
    metrics = writer(tmp_path)
    metrics.write({"step": 1, "rewards/margins": value, "loss": 1e308})
    assert json.loads(lines(tmp_path)[0]) == {"step": 1, "rewards/margins": None, "loss": 1e308}
    metrics.close()


def test_resuming_removes_later_rows_and_a_line_cut_short(tmp_path: Path) -> None:
    before = writer(tmp_path)
    for step in (1, 2, 3):
        before.write({"step": step, "loss": step / 10})
        before.write({"step": step, "eval/loss": 1.0})
    before.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    resumed = writer(tmp_path, resumed_step=2)
    resumed.write({"step": 3, "loss": 9.0})
    resumed.close()
    rows = [json.loads(line) for line in lines(tmp_path)]
    assert [(row["step"], row.get("loss")) for row in rows] == [
        (1, 0.1),
        (1, None),
        (2, 0.2),
        (2, None),
        (3, 9.0),
    ]


def test_starting_over_keeps_nothing(tmp_path: Path) -> None:
    """The evaluation before the first step is made again, and must not stand there twice."""
    crashed = writer(tmp_path)
    crashed.write({"step": 0, "eval/loss": 2.0})
    crashed.write({"step": 1, "loss": 2.0})
    crashed.close()
    again = writer(tmp_path, resumed_step=0)
    again.write({"step": 0, "eval/loss": 3.0})
    again.close()
    assert lines(tmp_path) == ['{"step": 0, "eval/loss": 3.0}']


def test_a_cut_line_of_a_kept_step_goes_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.')
    keep_rows_until(path, 5)
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n'
    keep_rows_until(tmp_path / "missing.jsonl", 5)
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_means_have_every_key_of_the_contract() -> None:
    means = mean_metrics({"pairs": 4.0, "loss": 2.0, "nll_loss": -6.0})
    assert tuple(means) == LOSS_KEYS
    assert means["loss"] == 0.5 and means["nll_loss"] == -1.5
    assert {key for key, value in means.items() if value is None} == {*LOSS_KEYS} - {
        "loss",
        "nll_loss",
    }


def test_tensorboard_gets_paced_rows_and_forgets_what_is_redone(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    first = writer(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": step / 2, "nll_loss": None}, to_trackers=step != 2)
    first.close()
    second = writer(tmp_path, tensorboard=True, resumed_step=1)
    second.write({"step": 2, "loss": 8.0})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 8.0)]


def test_wandb_writes_under_the_runs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    wandb = WandbConfig(project="tests", name="one", mode="offline")
    metrics = writer(tmp_path / "run", wandb=wandb)
    metrics.write({"step": 1, "loss": 0.5})
    metrics.close()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("wandb", r"logging\.wandb: the package wandb is not installed; .* or set it to null"),
        ("tensorboard", r"logging\.tensorboard \(true\): the package tensorboard is not"),
    ],
)
def test_a_missing_tracker_is_named(
    package: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LoggingConfig(dir=str(tmp_path), wandb=WandbConfig(project="p"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else name)
    with pytest.raises(UserError, match=message) as error:
        check_trackers(config)
    assert "\n" not in str(error.value)
    check_trackers(LoggingConfig(dir=str(tmp_path), tensorboard=False))


def test_wandb_without_a_login_is_an_error_of_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**settings: Any) -> None:
        raise wandb.Error("No API key configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"logging\.wandb: No API key .*mode to offline"):
        writer(tmp_path, wandb=WandbConfig(project="p"))
