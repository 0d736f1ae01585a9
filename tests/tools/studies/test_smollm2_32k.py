"""The study in tools/studies/smollm2_32k: its plan, commands and page; all of it in `slow`."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import pytest

from megatron_longpo.config.train import load_train_config, resolve
from tools.studies.smollm2_32k import page, study
from tools.studies.smollm2_32k.commands import ROOT, CommandFailed, Commands, OutOfTime, options
from tools.studies.smollm2_32k.plan import FULL, GRID, SEEDS, SETTING, Run, plan
from tools.studies.smollm2_32k.results import (
    read_results,
    result_path,
    write_result,
)
from tools.studies.smollm2_32k.ruler import has_ruler, ruler_path, write_ruler

RECIPE = ROOT / "examples" / "smollm2_32k"
RUNS = plan(SETTING)


def test_plan_compares_the_same_rows() -> None:
    names = [run.name for run in RUNS]
    assert len(set(names)) == len(names)
    for beta, weight, _ in GRID:
        other = [run.name for run in plan((beta, weight, 0.5))]
        assert len(set(other)) == len(other)
    methods = {run.method.name for run in RUNS if run.method is not None and run.is_compared}
    for name in methods:
        assert [run.seed for run in RUNS if run.name.startswith(f"{name}-s4")] == list(SEEDS)
    # The comparison is of losses alone: nothing else differs between the methods.
    keys = {key for run in RUNS if run.method is not None for key in run.method.options}
    assert all(key.startswith("objective.") or key == "reference.context" for key in keys)
    # The first seed of everything comes before the second of anything.
    assert names.index("longpo-b0.1-w0.1-a1-s43") > names.index(
        "longpo-b0.1-w0.1-a1-long-reference-s42"
    )


@pytest.mark.parametrize("run", [r for r in RUNS if r.method is not None and r.seed == 42])
def test_training_takes_the_settings(run: Run, tmp_path: Path) -> None:
    """Every run's settings are understood; nothing of them is a mistake in a key."""
    assert run.method is not None
    values = {**run.method.options, **run.options, "train.seed": run.seed}
    values |= {"model.hf_path": "none", "data.path": "none", "logging.dir": str(tmp_path)}
    values |= {"evaluation.nll.documents": "none"}
    values["evaluation.retrieval.haystack"] = "none"
    config = resolve(load_train_config(["--config", str(RECIPE / "train.yaml"), *options(values)]))
    assert config.model.rope_theta == run.options.get("model.rope_theta", 1e6)
    assert config.train.steps == run.options.get("train.steps", 160)
    assert config.optimizer.lr == run.options.get("optimizer.lr", 1e-4)
    assert config.optimizer.name == "adam"
    is_plain_nll = run.method.name == "nll"
    assert (config.objective.nll_scope == "chosen_row") == is_plain_nll or "longpo" in run.name
    assert (config.reference.mode == "none") == (run.method.name in ("nll", "sft"))


def test_commands_end_in_time(tmp_path: Path) -> None:
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); time.sleep(60)"
    commands = Commands(tmp_path, minutes=0.03)
    started = time.monotonic()
    with pytest.raises(OutOfTime):
        commands.together({"a": [sys.executable, "-c", code], "b": [sys.executable, "-c", "0"]})
    assert time.monotonic() - started < 30
    with pytest.raises(OutOfTime):
        commands.python("never", "-c", "raise SystemExit(1)")
    assert not (tmp_path / "never.log").exists()


def test_commands_share_the_gpus(tmp_path: Path) -> None:
    code = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"
    commands = Commands(tmp_path, minutes=None, gpus=("3", "5"))
    commands.together({name: [sys.executable, "-c", code] for name in "abc"})
    with commands.on_gpu("5"):
        commands.together({name: [sys.executable, "-c", code] for name in "de"})
    Commands(tmp_path, minutes=None).python("f", "-c", code)
    seen = [commands.log_path(name).read_text().strip() for name in "abcdef"]
    assert seen[:5] == ["3", "5", "3", "5", "5"]
    assert seen[5] == str(os.environ.get("CUDA_VISIBLE_DEVICES"))


def test_runs_have_a_gpu_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time on each of two GPUs, never more."""
    arguments: dict[str, Any] = {"scale": FULL, "runs": RUNS, "model": None, "shards": 1}
    made = study.Study(
        **arguments, output=tmp_path, results=tmp_path, minutes=None, jobs=2, gpus=("3", "5")
    )
    under_way, most, lock = Counter[str](), Counter[str](), Lock()

    def do(run: Run) -> None:
        with lock:
            order.append(run.name)
        log = Path(made.commands.log_path(run.name))
        code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
        made.commands.python(run.name, "-c", code)
        gpu = log.read_text().strip()
        with lock:
            under_way[gpu] += 1
            most[gpu] = max(most[gpu], under_way[gpu])
        time.sleep(0.2)
        with lock:
            under_way[gpu] -= 1

    monkeypatch.setattr(made, "do", do)
    order: list[Any] = []
    for part in ("make_model", "make_documents", "make_first_model"):
        monkeypatch.setattr(made, part, partial(order.append, part))
    for part in ("make_pairs", "make_rows"):
        monkeypatch.setattr(
            made, part, lambda iteration, part=part: order.append((part, iteration))
        )
    second = [run for run in RUNS if run.iteration == 2]
    wanted = [*second, *RUNS[:12]]
    done = study.do_all(made, wanted, gpus=("3", "5"), jobs=2, takes_our_pairs=False)
    assert done == 0
    assert set(most) == {"3", "5"} and max(most.values()) == 2
    # The second iteration's pairs are made by a model of the first, when no run is under way.
    names = [step if isinstance(step, str) else step[0] for step in order]
    assert names[:4] == ["make_model", "make_documents", "make_pairs", "make_rows"]
    assert set(names[4:-4]) == {run.name for run in RUNS[:12]}
    assert names[-4:] == ["make_first_model", "make_pairs", "make_rows", second[0].name]


def test_a_failed_command_shows_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CommandFailed, match="broken: exit code 3"):
        Commands(tmp_path, minutes=None).python("broken", "-c", "print('why'); raise SystemExit(3)")
    assert "  | why" in capsys.readouterr().out


def test_options_are_yaml() -> None:
    found = options({"a": None, "b.c": False, "d": [1, 2], "e": 1e-4, "f": "x"})
    assert found == ["--a", "null", "--b.c", "false", "--d", "[1, 2]", "--e", "0.0001", "--f", "x"]


def results_of(
    tmp_path: Path,
    values: dict[str, tuple[float, float, float]],
    *,
    pairs: str = "here",
    settings: str | None = None,
) -> Path:
    """Results with retrieval and ends at 4K and 16K and KL, of runs by name."""
    runs = {run.name: run for run in RUNS}
    for name, (short, long, kl) in values.items():
        cells = [
            {"kind": "passkey", "length": n, "depth": 0.5, "samples": 20, "exact": x}
            for n, x in ((4096, short), (16384, long))
        ]
        record: dict[str, Any] = {"retrieval": [{**c, "token_accuracy": 1.0} for c in cells]}
        record["nll"] = [{"start": 0, "stop": 4096, "tokens": 9, "nll": 2.5}]
        record["retention"] = {"prompts": 1, "positions": 9, "kl": kl, "agreement": 0.9}
        numbers = {"retrieval/4096": short, "retrieval/16384": long, "nll/0-4096": 2.5}
        numbers |= {"ends/4096": short, "ends/16384": long}
        numbers |= {"retention/kl": kl, "retention/agreement": 0.9}
        evaluated = tmp_path / "evaluation.json"
        evaluated.write_text(json.dumps({"numbers": numbers, "results": record}))
        metrics = tmp_path / "metrics.jsonl"
        rows: list[dict[str, Any]] = [{"step": 0, "eval/time_s": 9.0, "eval/retention/kl": 0.0}]
        rows += [{"step": n, "loss": 1.0 / n, "step_time_s": 0.5} for n in range(1, 21)]
        rows += [{"step": 20, "eval/time_s": 0.5, "eval/retention/kl": kl}]
        metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        run = runs[name]
        write_result(
            result_path(tmp_path / "results", run),
            run,
            seconds={"evaluate": 30.0} | ({} if run.method is None else {"train": 90.0}),
            evaluation_file=evaluated,
            metrics_file=None if run.method is None else metrics,
            device="CPU",
            pairs=None if run.method is None else pairs,
        )
        if settings is not None:
            path = result_path(tmp_path / "results", run)
            path.write_text(json.dumps({**json.loads(path.read_text()), "settings": settings}))
    return tmp_path / "results"


def describe_pairs(folder: Path, digest: str) -> None:
    generated = {"num_documents": 3, "num_examples": 2, "dropped": {"document: x": 1}}
    described = {
        **{"digest": digest, "generated": generated, "kinds": {"x": 2}, "pairs": 2, "turns": 2},
        **{"answers": {"turns": 2, "rejected_wrong": 2}, "shown": []},
    }
    folder.mkdir(exist_ok=True)
    (folder / "pairs-1.json").write_text(json.dumps(described))
    (folder / "pairs-1.jsonl.gz").write_bytes(gzip.compress(b""))


def test_runs_are_compared_on_the_same_pairs(tmp_path: Path) -> None:
    results = results_of(tmp_path, {"base-theta1e5": (0.9, 0, 0), "nll-s42": (0.8, 0.5, 0.1)})
    results_of(tmp_path, {"sft-s42": (0.7, 0.4, 0.2)}, pairs="of another machine")
    results_of(tmp_path, {"dpo-s42": (0.7, 0.4, 0.2)}, settings="another learning rate")
    arguments: dict[str, Any] = {"scale": FULL, "runs": RUNS, "model": None, "shards": 1}
    made = study.Study(**arguments, output=tmp_path, results=results, minutes=None, jobs=1)
    runs = {run.name: run for run in RUNS}
    assert not made.is_done(runs["nll-s42"]), "its pairs are not there"
    describe_pairs(tmp_path / "keep", "here")
    done = [run.name for run in RUNS if made.is_done(run)]
    assert sorted(done) == ["base-theta1e5", "nll-s42"]
    model = made.first_model
    describe_pairs(tmp_path / "keep", "of another draw")
    assert [run.name for run in RUNS if made.is_done(run)] == ["base-theta1e5"]
    assert made.first_model != model, "what was made of other pairs is not taken"
    describe_pairs(tmp_path / "keep", "here")
    describe_pairs(results, "here")
    page.write_page(results, tmp_path, tmp_path / "keep", RUNS)
    text = (results / "README.md").read_text()
    assert "| NLL of the chosen row | 1 | 20 |" in text
    assert "SFT" not in text and "DPO" not in text


def test_training_counts_while_its_checkpoint_is_there(tmp_path: Path) -> None:
    describe_pairs(tmp_path / "keep", "here")
    arguments: dict[str, Any] = {"scale": FULL, "runs": RUNS, "model": None, "shards": 1}
    made = study.Study(**arguments, output=tmp_path, results=tmp_path, minutes=None, jobs=1)
    (run,) = [run for run in RUNS if run.name == "nll-s42"]
    whole = made.predicted_seconds(run)
    folder = made._folder(run)
    (folder / "checkpoints").mkdir(parents=True)
    assert made.predicted_seconds(run) == whole
    (folder / "trained.json").write_text('{"seconds": 9}')
    assert made.predicted_seconds(run) < whole
    assert made.train(run, folder, tmp_path / "rows.jsonl") == 9
    (folder / "checkpoints").rmdir()
    assert made.predicted_seconds(run) == whole


def test_page(tmp_path: Path) -> None:
    values = {
        "base-theta1e5": (0.95, 0.0, 0.0),
        "longpo-b0.1-w0.1-a1-s42": (1.0, 0.90, 0.10),
        "longpo-b0.1-w0.1-a1-s43": (0.9, 1.00, 0.12),
        "nll-s42": (1.0, 0.75, 0.145),
        "longpo-b0.1-w1-s42": (0.5, 0.5, 0.5),
    }
    results = results_of(tmp_path, values)
    describe_pairs(results, "here")
    page.write_page(results, tmp_path, tmp_path / "keep", RUNS)
    text = (results / "README.md").read_text()
    lead = "LongPO, beta 0.1, weight 0.1, answers 1"
    line = "0.95 ± 0.07 | 0.95 ± 0.07 | 0.95 ± 0.07 | 0.95 ± 0.00 | 2.50 ± 0.00 | 0.110 ± 0.014"
    assert f"| {lead} | 2 | 20 | {line} |" in text
    assert "| base | 1 | 20 | 0.95 | 0.00 | 0.95 | 0.47 | 2.50 | 0.000 | 0.90 |" in text
    # The grid has a table of its own, after the targets.
    assert text.index("weight 1 |") > text.index("## Other settings") > text.index("## Targets")
    assert "| retrieval at 16K at least 0.90 | 0.95 | met |" in text
    assert "| retrieval at 4K not below the base's 0.95 | 0.95 | met |" in text
    below = page._least_line("x", 0.947, 0.95), page._least_line("x", 0.94, 0.95)
    assert below == ("| x | 0.947 | missed |", "| x | 0.94 | missed |")
    # NLL finds 0.875 of the two longest, LongPO 0.95: no equal, until another NLL run is. That it
    # loses more nevertheless is enough.
    kl = "short KL below plain NLL's at equal retrieval"
    title = "NLL of the chosen row"
    only = f"({title}), which finds only 0.88 at the two longest"
    assert f"| {kl}: 0.145 {only} | 0.110 | met |" in text
    nearer = results_of(tmp_path, {"nll-s42": (1.0, 0.75, 0.09)})
    page.write_page(nearer, tmp_path, tmp_path / "keep", RUNS)
    without = f"| {kl}: 0.090 {only} | 0.110 | without an equal |"
    assert without in (results / "README.md").read_text()
    longer = {"nll-480-s42": (1.0, 0.9, 0.2)}
    page.write_page(results_of(tmp_path, longer), tmp_path, tmp_path / "keep", RUNS)
    assert (
        f"| {kl}: 0.200 ({title}, 480 steps) | 0.110 | met |" in (results / "README.md").read_text()
    )
    # 0.5 s every 50 steps of 0.5 s; the first evaluation does not count.
    assert "| nll-s42 | 0.500 s | 0.50 s | 2.0% | met |" in text
    assert "2.0% in the median of 4 runs, below 3% in 4." in text
    for name in ("retrieval.png", "retention.png", "curves.png", "retrieval_heatmap.png"):
        assert f"![{name}]({name})" in text
        assert (results / name).read_bytes()[:4] == b"\x89PNG"
    (found,) = [r for r in read_results(results) if r.name == "nll-s42"]
    assert found.curves["loss"][1] == 0.5 and len(found.curves["step"]) == 20
    assert found.seconds_per_step == 0.5 and found.group == "nll"


def test_page_with_ruler(tmp_path: Path) -> None:
    results = results_of(tmp_path, {"base-theta1e5": (0.95, 0.0, 0.0)})
    lead = "LongPO, beta 0.1, weight 0.1, answers 1"
    for name, title, value in (("base", "base", 0.25), ("first", lead, 0.5)):
        numbers = {"suite/ruler": value, "suite/ruler/4096": value, "suite/ruler/vt": value / 2}
        evaluated = tmp_path / "ruler.json"
        evaluated.write_text(json.dumps({"numbers": {**numbers, "suite/ruler/vt/4096": 0.1}}))
        made_of = None if name == "base" else "here"
        path = ruler_path(results, name)
        write_ruler(path, evaluated, title=title, device="CPU", pairs=made_of)
        assert has_ruler(path, pairs=made_of) and not has_ruler(path, pairs="others")
    describe_pairs(results, "here")
    page.write_page(results, tmp_path, tmp_path / "keep", RUNS)
    text = (results / "README.md").read_text()
    assert "|  | 4K |" in text and f"| {lead} | 0.500 |" in text
    assert f"| task | base | {lead} |" in text and "| vt | 0.12 | 0.25 |" in text


@pytest.mark.slow
def test_all_of_it_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at once, then made whole, then nothing is left to do."""
    output = str(tmp_path / "out")
    arguments = ["study", "--tiny", "--output", output]
    monkeypatch.setattr(sys, "argv", [*arguments, "--minutes", "0.02"])
    assert study.main() == 75
    monkeypatch.setattr(sys, "argv", [*arguments, "--jobs", "2"])
    assert study.main() == 0
    found = read_results(tmp_path / "out" / "results")
    assert Counter(bool(result.numbers) for result in found) == {True: 12, False: 1}
    text = (tmp_path / "out" / "results" / "README.md").read_text()
    assert "lr 3e-5, second iteration" in text and "Pairs of iteration 2" in text
    assert not list((tmp_path / "out").glob("**/runs/*/checkpoints"))
    before = time.monotonic()
    assert study.main() == 0
    assert time.monotonic() - before < 120


def test_our_results_are_recognised_and_give_our_page(tmp_path: Path) -> None:
    """The results in the repository are by the recipe's files as they are, and make its page."""
    ours = Path(study.__file__).with_name("results")
    copied = tmp_path / "results"
    shutil.copytree(ours, copied)
    (copied / "README.md").unlink()
    by_name = {result.name: result for result in read_results(copied)}
    compared = [run for run in RUNS if run.is_compared and run.name in by_name]
    assert len(compared) >= 20
    assert all(by_name[run.name].is_by_settings_of(run) for run in compared)
    page.write_page(copied, tmp_path / "output", tmp_path / "keep", RUNS)
    assert (copied / "README.md").read_bytes() == (ours / "README.md").read_bytes()
