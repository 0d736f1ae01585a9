"""`longpo report` on made-up metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.cli import main
from megatron_longpo.config.report import ReportConfig
from megatron_longpo.engine.report import panels_of, read_run, run_report
from megatron_longpo.errors import UserError

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(folder: Path, *, evaluated: bool = True, tail: str = "") -> Path:
    rows: list[dict[str, Any]] = []
    if evaluated:
        rows.append({"step": 0, "eval/loss": 2.5, "eval/rewards/margins": -0.125})
    rows += [
        {"step": step, "loss": 4.0 / step, "preference_loss": 0.5, "rewards/margins": step / 8}
        for step in range(1, 5)
    ]
    if evaluated:
        rows.append({"step": 4, "eval/loss": 1.5, "eval/rewards/margins": 0.25})
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + tail)
    return folder


def test_training_and_evaluation_rows_are_told_apart(tmp_path: Path) -> None:
    run = read_run(str(write_run(tmp_path)))
    assert run.series("loss") == ([1, 2, 3, 4], [4.0, 2.0, 4.0 / 3, 1.0])
    assert run.series("eval/loss") == ([0, 4], [2.5, 1.5])
    assert run.series("nll_loss") == ([], [])


def test_it_plots_beside_the_metrics_and_prints_first_and_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "a")
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.png").read_bytes().startswith(PNG)
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "report.png"]
    lines = {
        line.split()[1]: line.split()
        for line in capsys.readouterr().out.splitlines()
        if "│" in line
    }
    assert lines["loss"][3::2] == ["4", "1", "-3"]
    assert lines["eval/loss"][3::2] == ["2.5", "1.5", "-1"]
    assert lines["eval/rewards/margins"][3::2] == ["-0.125", "0.25", "+0.375"]
    assert "nll_loss" not in lines


def test_every_part_of_a_loss_has_a_panel(tmp_path: Path) -> None:
    row = {"step": 1, "loss": 1.0, "new_loss": 2.0, "nll_loss": None, "tokens_per_second": 3.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    run = read_run(str(tmp_path))
    assert panels_of([run]) == ["loss", "new_loss", "tokens_per_second"]


def test_several_runs_share_one_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_run(tmp_path / "a")
    second = write_run(tmp_path / "b", evaluated=False)
    output = tmp_path / "plots" / "both.png"
    assert main(["report", str(first), f"{second}/metrics.jsonl", "--output", str(output)]) == 0
    assert output.read_bytes().startswith(PNG)
    assert not (first / "report.png").exists()


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    run = read_run(str(write_run(tmp_path, tail='{"step": 5, "los')))
    assert run.series("loss")[0] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "no metrics.jsonl there. Give the logging.dir of a training run"),
        ("", "metrics.jsonl is empty"),
        ('{"step": 1}\nnonsense\n{"step": 2}\n', "metrics.jsonl:2: not a JSON object"),
        ('{"loss": 1}\n', "metrics.jsonl:1: no integer `step`"),
        ("[1]\n", "metrics.jsonl:1: no integer `step`"),
    ],
)
def test_what_is_no_run_is_said(tmp_path: Path, text: str | None, expected: str) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError) as caught:
        run_report(ReportConfig(runs=(str(tmp_path),)))
    assert expected in str(caught.value)
    assert not (tmp_path / "report.png").exists()


def test_the_output_is_a_png(tmp_path: Path) -> None:
    write_run(tmp_path)
    with pytest.raises(UserError, match=r"must end in \.png"):
        run_report(ReportConfig(runs=(str(tmp_path),), output=str(tmp_path / "plot.svg")))
