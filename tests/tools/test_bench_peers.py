"""DPO here and in TRL, side by side: the same rows, the same numbers, and a table of both."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_longpo.parallel.groups import Groups
from tools import bench_peers, peer_longpo, peer_trl
from tools.bench_models import SHAPES
from tools.peer_case import Case, Numbers, StepClock, Trials

SHAPE = SHAPES["small"].changed(layers=2, hidden=32, ffn=48, heads=4, kv_heads=2, vocabulary=300)
SETTINGS = peer_trl.Settings(attention="sdpa", liger=False, checkpointing=True)


def make_case(folder: Path, **changes: Any) -> Case:
    case = Case(
        shape_name="tiny",
        shape=replace(SHAPE, class_name="Qwen2ForCausalLM", tied=True),
        context=120,
        answer=9,
        dtype="fp32",
        reference="online",
        warmup=1,
        repeats=2,
        folder=str(folder),
    )
    return replace(case, **changes)


@pytest.fixture
def unmasked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each attention call of transformers was causal and had no mask."""
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def recorded(*tensors: Any, **settings: Any) -> Any:
        calls.append(settings["attn_mask"] is None and settings["is_causal"])
        return attend(*tensors, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    return calls


@pytest.mark.parametrize("reference", ["online", "cached"])
def test_both_sides_see_the_same_numbers(
    tmp_path: Path, single_process: Groups, unmasked: list[bool], reference: str
) -> None:
    case = make_case(tmp_path, reference=reference)
    case.write_inputs()
    dataset = peer_trl.as_trl_dataset(case.rows())
    theirs = peer_trl.train_steps(case, SETTINGS, dataset, StepClock(case))
    assert len(unmasked) >= 3 * SHAPE.layers and all(unmasked), "TRL's rows were padded"
    if reference == "cached":
        peer_longpo.score_reference(case)
    ours = peer_longpo.train_steps(peer_longpo.settings(case, "none"), StepClock(case))
    assert ours[0].loss == pytest.approx(math.log(2), abs=1e-6)
    assert len({numbers.chosen_logps for numbers in ours}) == case.num_steps, "one row alone"
    assert len(theirs) == len(ours) == case.num_steps
    for step, numbers in zip(theirs, ours, strict=True):
        assert tuple(numbers) == pytest.approx(tuple(step), rel=1e-5)


def test_a_case_comes_back_from_its_file(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    case.write(tmp_path / "case.json")
    assert Case.read(tmp_path / "case.json") == case


def test_a_run_prints_and_saves_both_sides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = tmp_path / "peers.json"
    arguments = ["--shapes", "small", "--contexts", "200", "--answer", "9", "--dtype", "fp32"]
    arguments += ["--repeats", "2", "--json", str(numbers), "--logs", str(tmp_path / "logs")]
    bench_peers.bench(bench_peers.parse_arguments(arguments))
    (row,) = json.loads(numbers.read_text())["cases"]
    assert row["loss_apart"] < 1e-4 and row["logps_apart"] < 1e-4
    trials = {side: found["trials"] for side, found in row["sides"].items()}
    assert [trial["settings"] for trial in trials["longpo"]] == [{"recompute": "none"}]
    assert [trial["settings"]["checkpointing"] for trial in trials["trl"]] == [True, False]
    for side in row["sides"].values():
        assert side["stopped"] is None and side["pairs_per_second"] > 0
        assert all(trial["failure"] is None and trial["median_s"] > 0 for trial in side["trials"])
    untuned = trials["trl"][0]["median_s"] * row["sides"]["longpo"]["pairs_per_second"]
    assert f"| {row['ours_over_theirs']:.2f} | {untuned:.2f} |" in capsys.readouterr().out


def test_without_trl_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        bench_peers.parse_arguments([])
    assert "Run: pip install trl" in capsys.readouterr().err


def test_a_trial_that_fails_leaves_the_others(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    trials = Trials(case, tmp_path / "result.json")

    def steps(clock: StepClock) -> list[Numbers]:
        clock.start()
        while not clock.step_done():
            pass
        return [Numbers(0.7, -3.0, -4.0)]

    def out_of_memory(clock: StepClock) -> list[Numbers]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    def broken(clock: StepClock) -> list[Numbers]:
        raise ValueError("no such kernel\nat all")

    trials.run({"name": "a"}, out_of_memory)
    trials = Trials(case, tmp_path / "result.json")  # of the next process
    for name, train in (("b", steps), ("c", broken)):
        trials.run({"name": name}, train)
    saved = json.loads((tmp_path / "result.json").read_text())["trials"]
    failures = [trial["failure"] for trial in saved]
    assert failures == ["out of memory", None, "ValueError: no such kernel"]
    assert trials.best is trials.trials[1] and len(saved[1]["step_s"]) == case.repeats


def test_a_slow_trial_ends_early(tmp_path: Path) -> None:
    case = make_case(tmp_path, warmup=1, repeats=9)
    clock = StepClock(case, best=1e-12)
    clock.start()
    assert [clock.step_done() for _ in range(3)] == [False, False, True]


def test_where_the_first_does_not_fit_the_next_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def run(command: list[str], **_: Any) -> None:
        tried.append(command[-1])
        fits = command[-1] == "all_but_attention"
        trials = [{"median_s": 0.5 if fits else None}]
        Path(command[-2]).write_text(json.dumps({"trials": trials}))

    monkeypatch.setattr(bench_peers, "run", run)
    found = bench_peers.run_side(make_case(tmp_path), "longpo", logs=tmp_path, timeout_s=1)
    assert tried == ["none", "all_but_attention"]
    assert found == {"trials": [{"median_s": 0.5}], "stopped": None}


def test_what_has_no_result_says_why(tmp_path: Path) -> None:
    """A side that runs out of time keeps what it has; one that ran out of memory says so."""
    case = make_case(tmp_path)
    timed_out = bench_peers.run_side(case, "trl", logs=tmp_path, timeout_s=0.01)
    assert timed_out["trials"] == [] and timed_out["stopped"] == "timed out after 0.01 s"
    trial = {"settings": {"recompute": "none"}, "failure": None, "median_s": 0.5, "numbers": []}
    ours = {"trials": [{**trial, "peak_memory_gib": 30.0, "step_s": [0.5]}], "stopped": None}
    failed = {**asdict(SETTINGS), "median_s": None, "failure": "out of memory"}
    theirs = {"trials": [failed, failed], "stopped": None}
    rows = [
        bench_peers.compared(case, {"trl": side, "longpo": ours}) for side in (timed_out, theirs)
    ]
    lines = bench_peers.table(rows).splitlines()[2:]
    for line, reason in zip(lines, ("timed out after 0.01 s", "out of memory"), strict=True):
        assert (
            f"| online | {reason} | 2.000 | - | - | - | 30.0 GiB | - | recompute none | - |" in line
        )
