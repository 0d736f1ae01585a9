"""`longpo evaluate --compare`: tables, files and plots of evaluations and runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.errors import UserError
from megatron_longpo.evaluation.compare import best_of, run_compare
from megatron_longpo.evaluation.compared import names, read_evaluated
from megatron_longpo.evaluation.results import flat_numbers


def record_of(gain: float) -> dict[str, Any]:
    return {
        "retrieval": [
            {
                "kind": "passkey",
                "length": length,
                "depth": depth,
                "samples": 4,
                "exact": min(1.0, gain + 0.25 * depth),
                "token_accuracy": 0.9,
                "ends": gain,
            }
            for length in (4096, 8192)
            for depth in (0.0, 1.0)
        ],
        "nll": [{"start": 0, "stop": 4096, "tokens": 9, "nll": 3.0 - gain}],
        "retention": {"prompts": 2, "positions": 30, "kl": gain / 10, "agreement": 1 - gain / 5},
    }


def write_evaluation(folder: Path, gain: float) -> str:
    folder.mkdir(parents=True)
    contents = {"results": record_of(gain), "settings": {}, "model": "m"}
    (folder / "evaluation.json").write_text(json.dumps(contents))
    return str(folder)


def write_run(folder: Path) -> str:
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    records = []
    for step, gain in ((0, 0.1), (2, 0.4), (4, 0.7)):
        numbers = {f"eval/{key}": value for key, value in flat_numbers(record_of(gain)).items()}
        rows.append({"step": step, **numbers, "eval/rewards/accuracies": gain, "eval/time_s": 1.0})
        records.append({"step": step, **record_of(gain)})
    rows.insert(1, {"step": 1, "loss": 1.0})
    for name, lines in (("metrics", rows), ("evaluation", records)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    return str(folder)


def test_models_and_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [
        write_evaluation(tmp_path / "base", 0.2),
        write_evaluation(tmp_path / "trained", 0.9),
        write_run(tmp_path / "run"),
    ]
    output = tmp_path / "comparison"
    run_compare(paths, output)
    contents = json.loads((output / "comparison.json").read_text())
    assert [one["name"] for one in contents] == ["base", "trained", "run"]
    assert contents[2]["step"] == 4 and len(contents[2]["history"]) == 3
    assert contents[0]["numbers"]["retrieval/4096"] == pytest.approx((0.2 + 0.45) / 2)
    assert contents[1]["results"] == record_of(0.9)
    rows = list(csv.DictReader((output / "comparison.csv").open()))
    assert [row["retention/kl"] for row in rows] == ["0.02", "0.09", "0.06999999999999999"]
    assert [row["rewards/accuracies"] for row in rows] == ["", "", "0.7"]
    lines = (output / "comparison.md").read_text().splitlines()
    assert lines[0] == "| | base | trained | run (step 4) |"
    assert "| retrieval/8192 | 0.325 | **0.95** | 0.825 |" in lines
    assert "| retention/kl | **0.02** | 0.09 | 0.07 |" in lines
    assert "| rewards/accuracies |  |  | 0.7 |" in lines
    plots = {path.name for path in output.glob("*.png")}
    assert plots == {
        *("retrieval_heatmap.png", "retrieval_by_length.png", "nll_by_position.png"),
        *("retention.png", "curves.png"),
    }
    assert all((output / name).read_bytes()[:4] == b"\x89PNG" for name in plots)
    assert not list(output.glob("*.partial"))
    said = capsys.readouterr().out
    assert "retrieval/4096" in said and "run (step 4)" in said


def test_what_nobody_has_is_not_drawn(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    write_evaluation(folder, 0.5)
    contents = json.loads((folder / "evaluation.json").read_text())
    contents["results"] = {"retention": contents["results"]["retention"]}
    (folder / "evaluation.json").write_text(json.dumps(contents))
    run_compare([str(folder)], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"retention.png"}


def test_the_best_is_known_where_there_is_a_choice(tmp_path: Path) -> None:
    one, other = (
        read_evaluated(write_evaluation(tmp_path / name, gain), name)
        for name, gain in (("a", 0.2), ("b", 0.6))
    )
    assert best_of("retrieval/4096", [one, other]) == other.numbers["retrieval/4096"]
    assert best_of("ends/8192", [one, other]) == other.numbers["ends/8192"] == 0.6
    assert best_of("retention/kl", [one, other]) == one.numbers["retention/kl"]
    assert best_of("retention/kl", [one]) is None
    assert best_of("retention/kl", [one, one]) is None


def test_names_are_as_short_as_can_be() -> None:
    assert names(["x/a", "y/b"]) == ["a", "b"]
    assert names(["x/1/a", "x/2/a"]) == ["1/a", "2/a"]
    with pytest.raises(UserError, match="one stands twice"):
        names(["x/a", "x/a"])


def test_folders_without_an_evaluation_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(UserError, match=r"neither evaluation\.json of longpo evaluate nor metric"):
        run_compare([str(tmp_path)], output)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(UserError, match="the run has not evaluated"):
        run_compare([str(tmp_path)], output)
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match="not written by longpo evaluate"):
        run_compare([str(tmp_path)], output)
    assert not output.exists()
