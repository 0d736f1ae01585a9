"""The benchmarks run on a CPU, and count what they say they count."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_longpo.data.trees.forest import NO_PARENT
from megatron_longpo.model.attention.blocks import Attended, Block
from megatron_longpo.model.attention.kernels import CpuFlashKernel
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.parallel.layout import lay_out
from tests.model.attention.test_tree_attention import make_forest
from tools import bench_bare, bench_head, bench_step
from tools.bench_bare import Limit, blocks_of, fastest, linear_shapes, num_attended, sustained
from tools.bench_models import SHAPES, PairShape, random_pair
from tools.bench_trace import breakdown

TINY = "--layers 2 --hidden 32 --ffn 48 --heads 4 --kv-heads 2 --vocabulary 300".split()  # noqa: SIM905
PAIR = PairShape(context=1000, turns=2, answer=35, question=5, chunk=120)


def test_a_pair_has_the_shape_of_longpo() -> None:
    pair = random_pair(PAIR, vocabulary=300)
    assert max(len(pair.chosen.input_ids), len(pair.rejected.input_ids)) == PAIR.context
    assert len(pair.reference_chosen) == len(pair.reference_rejected) == PAIR.turns
    labelled = [int((row.labels >= 0).sum()) for row in (pair.chosen, pair.rejected)]
    for row, answers in zip(
        (pair.reference_chosen, pair.reference_rejected), labelled, strict=True
    ):
        assert sum(int((short.labels >= 0).sum()) for short in row) == answers
        assert all(20 <= int((short.labels >= 0).sum()) <= 50 for short in row)
    shared = (pair.chosen.input_ids[:900] == pair.rejected.input_ids[:900]).all()
    assert shared and not (pair.chosen.labels[:900] >= 0).any()


def test_a_tree_is_two_causal_blocks_and_a_rectangle() -> None:
    plan = lay_out(make_forest([NO_PARENT, 0, 0], [7, 2, 3]), device=torch.device("cpu")).attention
    assert blocks_of(plan) == Counter({(9, 9, True): 1, (3, 3, True): 1, (3, 7, False): 1})


class SlowKernel(CpuFlashKernel):
    """Takes as long as its pairs, and remembers its calls."""

    def __init__(self, seconds_a_pair: float) -> None:
        self.seconds_a_pair = seconds_a_pair
        self.blocks: list[tuple[int, int, bool]] = []

    def forward(self, block: Block) -> Attended:
        query = block.query
        self.blocks.append((len(query), len(block.key), block.causal))
        time.sleep(self.seconds_a_pair * num_attended(self.blocks[-1]))
        return Attended(query, query.new_zeros(query.shape[1], len(query)))

    def backward(self, *args: Any) -> Any:
        return ()


def test_alike_blocks_are_timed_once_and_by_the_fastest_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quick, slow = SlowKernel(1e-6), SlowKernel(3e-6)
    monkeypatch.setattr(bench_bare, "LARGEST_BLOCK", 512)
    monkeypatch.setattr(bench_bare, "SCREENED_BLOCK", 128)
    monkeypatch.setattr(
        bench_bare, "available_kernels", lambda *_, **__: {"slow": slow, "quick": quick}
    )
    limit = Limit(head_dim=8, device=torch.device("cpu"), dtype=torch.float32)

    def seconds(queries: int, keys: int, *, causal: bool) -> float:
        return limit.block_seconds((queries, keys, causal), 2, 1, backward=True, timer=fastest)

    first = seconds(510, 510, causal=True)
    assert 1 <= first / (1e-6 * 510 * 511 / 2) < 2
    assert set(slow.blocks) == {(128, 128, True)}
    assert set(quick.blocks) == {(128, 128, True), (504, 504, True)}
    num_calls = len(quick.blocks)
    alike = seconds(505, 505, causal=True)
    assert alike == pytest.approx(first * (505 * 506) / (510 * 511)), "timed at 504 as well"
    assert len(quick.blocks) == num_calls
    assert 1 <= seconds(40, 2000, causal=False) / (1e-6 * 40 * 2000) < 2
    assert max(keys for _, keys, _ in quick.blocks) == 512


def test_linear_shapes_have_the_parameters_of_mistral() -> None:
    shape: Any = SHAPES["mistral-7b"]
    arch = type(
        "Arch",
        (),
        {
            "hidden_size": shape.hidden,
            "ffn_hidden_size": shape.ffn,
            "num_heads": shape.heads,
            "num_kv_heads": shape.kv_heads,
            "head_dim": 128,
        },
    )
    whole = sum(width * out for width, out in linear_shapes(arch))  # type: ignore[arg-type]
    half = sum(width * out for width, out in linear_shapes(arch, 2))  # type: ignore[arg-type]
    assert whole == 218_103_808 and 2 * half == whole


def test_a_bench_step_reports_every_mode(
    tmp_path: Path, single_process: Groups, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers, traces = tmp_path / "bench.json", tmp_path / "traces"
    arguments = ["--context", "300", "--chunk", "40", "--repeats", "2", "--reference", "none"]
    arguments += ["online", "--json", str(numbers), "--profile", str(traces), *TINY]
    bench_step.bench(bench_step.parse_arguments(arguments))
    report = json.loads(numbers.read_text())
    modes = report["modes"]
    assert set(modes) == {
        f"{layout}, reference {reference}"
        for layout in ("shared", "unshared")
        for reference in ("none", "online")
    }
    for name, mode in modes.items():
        assert len(mode["step_s"]) == 2 and mode["median_step_s"] > 0
        assert mode["model_tflops_per_gpu"] > 0 and 0 < mode["efficiency"] < 2
        assert ("reference" in mode["bare_s"]) == name.endswith("online")
        assert (mode["breakdown_s"]["reference"] > 0) == name.endswith("online")
        assert min(mode["breakdown_s"][part] for part in ("attention", "head", "optimizer")) > 0
    shared, unshared = modes["shared, reference none"], modes["unshared, reference none"]
    assert unshared["policy_tokens"] > 1.5 * shared["policy_tokens"]
    assert set(report["speedup"]) == {"none", "online"}
    assert len(list(traces.iterdir())) == 4
    lines = capsys.readouterr().out
    assert "sharing the prefix is" in lines
    assert re.search(r"^\[ *\d+\.\d s\] shared, reference online: step \d", lines, re.MULTILINE)


def test_a_run_that_is_cut_leaves_what_it_has_measured(
    tmp_path: Path, single_process: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_step, "profiled_step", cut)
    numbers = tmp_path / "bench.json"
    arguments = ["--context", "200", "--chunk", "40", "--repeats", "2", "--pairs", "2", *TINY]
    arguments += ["--shortest", "100"]
    arguments += ["--recompute", "full", "--recompute-layers", "1", "--json", str(numbers)]
    with pytest.raises(KeyboardInterrupt):
        bench_step.bench(bench_step.parse_arguments(arguments))
    report = json.loads(numbers.read_text())
    mode = report["modes"]["shared, reference none"]
    assert len(mode["step_s"]) == 2 and len(mode["warmup_s"]) == 1
    assert mode["model_tflops_per_gpu"] > 0 and mode["breakdown_s"] is None
    assert 200 + 100 < mode["policy_tokens"] < 340, "two pairs a step, of two lengths"
    assert report["speedup"]["none"] > 0 and report["settings"]["recompute_layers"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_a_row_of_calls_is_timed_as_their_mean() -> None:
    calls = []

    def slower_at_first() -> None:
        calls.append(None)
        time.sleep(0.05 if len(calls) <= 2 else 0.02)

    assert 0.02 <= sustained(slower_at_first) < 0.03
    assert len(calls) >= 2 + 5 + 12
    assert fastest(slower_at_first, repeats=0) == 0


def test_a_long_call_is_timed_no_more_often_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_bare, "COUNTED_SECONDS", 0.03)
    monkeypatch.setattr(bench_bare, "SUSTAINED_SECONDS", 0.02)
    for timer in (fastest, sustained):
        calls = []

        def long_call(calls: list[None] = calls) -> None:
            calls.append(None)
            time.sleep(0.04)

        assert timer(long_call) >= 0.04
        assert len(calls) == 2, "one that does not count, and one that does"


def test_the_head_is_timed_beside_its_products(single_process: Groups) -> None:
    row = bench_head.measure(64, 16, 300, groups_of_one=single_process, dtype=torch.float32)
    assert row["ours_ms"] > 0 and row["three_products_ms"] > 0
    assert row["ours_extra_gib"] is None and "liger_ms" not in row


def event(category: str, name: str, begin: float, duration: float) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": duration}


def test_a_cpus_trace_has_what_gloo_sent(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    events = [
        event("user_annotation", "step", 0, 1000),
        event("user_annotation", "attention", 100, 200),
        event("user_annotation", "gloo:all_gather", 250, 100),
        event("user_annotation", "gloo:recv", 900, 300),
    ]
    path.write_text(json.dumps({"traceEvents": events}))
    parts = {name: round(1e6 * seconds) for name, seconds in breakdown(path).items()}
    assert (parts["attention"], parts["communication"]) == (200, 50 + 100)
    assert parts["linears and the rest"] == 1000 - 200 - 150


def test_a_trace_is_read_kernel_by_kernel(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    events = [
        event("user_annotation", "step", 0, 1000),
        event("gpu_user_annotation", "attention", 100, 200),
        event("gpu_user_annotation", "reference", 400, 200),
        event("gpu_user_annotation", "attention", 450, 50),
        event("kernel", "flash_fprop", 100, 150),
        event("kernel", "elementwise", 260, 40),
        event("kernel", "flash_fprop", 450, 50),
        event("kernel", "nvjet_tst_128x256", 700, 100),
        event("kernel", "ncclDevKernel_AllReduce", 720, 100),
        event("kernel", "elementwise", 900, 10),
        {"ph": "M", "name": "process_name"},
    ]
    path.write_text(json.dumps({"traceEvents": events}))
    parts = {name: round(1e6 * seconds) for name, seconds in breakdown(path).items()}
    assert parts == {
        "attention": 190,
        "reference": 50,
        "linears": 100,
        "communication": 20,
        "overlapped communication": 80,
        "norms, activations, copies": 10,
        "idle": 1000 - 150 - 40 - 50 - 120 - 10,
    }
