"""DPO here beside TRL's DPOTrainer: pairs a second and memory, on the same rows and weights.

    python -m tools.bench_peers --json outputs/peers.json
    python -m tools.bench_peers --shapes qwen2.5-1.5b --contexts 16384 --references online cached
    python -m tools.bench_peers --dtype fp32 --shapes small --contexts 512 --answer 32   # on a CPU

A step is one pair: a long prompt and two answers of the same length (so that TRL has nothing to
pad), policy and frozen reference of the same random weights. TRL's trainer tries several settings
(tools/peer_trl.py), and its best median counts; the first of them is what it does when left alone.
Ours recomputes nothing where that fits, else all but attention. Every side of every case has
processes of its own; what is known is written after each case, and where a side runs out of memory
or of time the table says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from megatron_longpo.data.jsonl import write_whole
from megatron_longpo.runtime.gpu_memory import allow_expandable_segments
from tools.bench_models import SHAPES
from tools.peer_case import Case

SIDES = {"trl": ("",), "longpo": ("none", "all_but_attention")}
"""Modules `tools.peer_<side>`, and what is tried, a process each, until one of them has a time."""


def main() -> None:
    allow_expandable_segments()  # for both sides, which inherit it
    bench(parse_arguments())


def bench(arguments: argparse.Namespace) -> None:
    """Measures both sides of every case, prints and saves."""
    arguments.logs.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(arguments, folder):
            sides = {
                side: run_side(case, side, logs=arguments.logs, timeout_s=arguments.timeout)
                for side in SIDES
            }
            rows.append(compared(case, sides))
            print_trials(rows[-1])
            save(arguments, rows)
    print(table(rows))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=["qwen2.5-1.5b", "smollm2-135m"]
    )
    parser.add_argument(
        "--contexts",
        nargs="+",
        type=int,
        default=[16384, 8192, 32768],
        help="tokens of a row, in the order in which they run",
    )
    parser.add_argument("--references", nargs="+", choices=("online", "cached"), default=["online"])
    parser.add_argument("--answer", type=int, default=350, help="tokens of an answer")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--warmup", type=int, default=1, help="steps that are not counted")
    parser.add_argument("--repeats", type=int, default=3, help="counted steps of each trial")
    parser.add_argument("--timeout", type=float, default=150, help="seconds for a side of a case")
    parser.add_argument("--json", type=Path, help="file to write the numbers to, after each case")
    parser.add_argument("--logs", type=Path, default=Path("outputs/peers"), help="what sides print")
    arguments = parser.parse_args(argv)
    if importlib.util.find_spec("trl") is None:
        parser.error("trl is not installed. Run: pip install trl")
    return arguments


def cases(arguments: argparse.Namespace, folder: str) -> list[Case]:
    return [
        Case(
            shape_name=name,
            shape=SHAPES[name],
            context=context,
            answer=arguments.answer,
            dtype=arguments.dtype,
            reference=reference,
            warmup=arguments.warmup,
            repeats=arguments.repeats,
            folder=folder,
        )
        for name, context, reference in product(
            arguments.shapes, arguments.contexts, arguments.references
        )
    ]


def run_side(case: Case, side: str, *, logs: Path, timeout_s: float) -> dict[str, Any]:
    """Returns what a side measured; `stopped` says why it ended early, or is None."""
    case_path = Path(case.folder) / "case.json"
    result_path = Path(case.folder) / f"{case.name}-{side}.json"
    case.write(case_path)
    found: dict[str, Any] = {"device": None, "versions": {}, "trials": []}
    stopped = None
    for argument in SIDES[side]:
        command = [sys.executable, "-m", f"tools.peer_{side}", str(case_path), str(result_path)]
        stopped = run(
            [*command, *argument.split()],
            log_path=logs / "-".join(filter(None, (case.name, side, argument))),
            timeout_s=timeout_s,
        )
        if result_path.exists():
            found = json.loads(result_path.read_text(encoding="utf-8"))
        if best_trial(found) is not None:
            break
    return {**found, "stopped": stopped}


def run(command: list[str], *, log_path: Path, timeout_s: float) -> str | None:
    """Runs a process; returns why it failed, or None."""
    with log_path.with_suffix(log_path.suffix + ".log").open("w", encoding="utf-8") as log:
        try:
            code = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=timeout_s
            ).returncode
        except subprocess.TimeoutExpired:
            return f"timed out after {timeout_s:g} s"
    return None if code == 0 else f"exit code {code}, see {log.name}"


def best_trial(side: dict[str, Any]) -> dict[str, Any] | None:
    done = [trial for trial in side["trials"] if trial["median_s"] is not None]
    return min(done, key=lambda trial: trial["median_s"], default=None)


def compared(case: Case, sides: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns a row of the report, as plain JSON types."""
    best = {side: best_trial(found) for side, found in sides.items()}
    row: dict[str, Any] = {
        "shape": case.shape_name,
        "context": case.context,
        "reference": case.reference,
        "sides": {
            side: {
                **found,
                "best": trial,
                "pairs_per_second": None if trial is None else 1 / trial["median_s"],
            }
            for (side, found), trial in zip(sides.items(), best.values(), strict=True)
        },
        **dict.fromkeys(("ours_over_theirs", "ours_over_untuned", "loss_apart", "logps_apart")),
    }
    theirs, ours = best["trl"], best["longpo"]
    if theirs is not None and ours is not None:
        row["ours_over_theirs"] = theirs["median_s"] / ours["median_s"]
        untuned = sides["trl"]["trials"][0]["median_s"]
        row["ours_over_untuned"] = None if untuned is None else untuned / ours["median_s"]
        row["loss_apart"] = apart(theirs, ours, 0)
        row["logps_apart"] = max(apart(theirs, ours, 1), apart(theirs, ours, 2))
    return row


def apart(theirs: dict[str, Any], ours: dict[str, Any], number: int) -> float:
    """Returns the largest relative difference of one of `Numbers` over the steps of both."""
    pairs = zip(theirs["numbers"], ours["numbers"], strict=False)
    return max(abs(b[number] - a[number]) / abs(a[number]) for a, b in pairs)


def save(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if arguments.json is None:
        return
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(arguments).items()}
    report = {"settings": settings, "cases": rows}
    write_whole(arguments.json, json.dumps(report, indent=2) + "\n")


def print_trials(row: dict[str, Any]) -> None:
    print(f"{row['shape']}, {row['context']} tokens, reference {row['reference']}")
    for name, side in row["sides"].items():
        versions = ", ".join(f"{package} {number}" for package, number in side["versions"].items())
        print(f"  {name} on {side['device']}: {versions}")
        for trial in side["trials"]:
            print(f"    {_settings(trial)}: {_outcome(trial)}")
        if side["stopped"]:
            print(f"    {side['stopped']}")
    print(flush=True)


def _settings(trial: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_word(value)}" for key, value in trial["settings"].items())


def _word(value: Any) -> str:
    return ("off", "on")[value] if isinstance(value, bool) else str(value)


def _outcome(trial: dict[str, Any]) -> str:
    if trial["failure"]:
        return str(trial["failure"])
    steps = " ".join(f"{seconds:.3f}" for seconds in trial["step_s"])
    return f"median {trial['median_s']:.3f} s of {steps}, {_memory(trial)}"


def _memory(trial: dict[str, Any]) -> str:
    peak = trial["peak_memory_gib"]
    return "-" if peak is None else f"{peak:.1f} GiB"


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the table as Markdown, for docs/performance.md."""
    lines = [
        "| model | tokens | reference | TRL pairs/s | ours pairs/s | ours / TRL "
        "| ours / TRL untuned | TRL | ours | TRL's best | our best | loss, log-probs apart |",
        "|---" * 12 + "|",
    ]
    for row in rows:
        theirs, ours = row["sides"]["trl"], row["sides"]["longpo"]
        has_both = row["ours_over_theirs"] is not None
        cells = [
            row["shape"],
            f"{row['context']:,}",
            row["reference"],
            _pairs(theirs),
            _pairs(ours),
            _ratio(row["ours_over_theirs"]),
            _ratio(row["ours_over_untuned"]),
            *("-" if side["best"] is None else _memory(side["best"]) for side in (theirs, ours)),
            *("-" if side["best"] is None else _settings(side["best"]) for side in (theirs, ours)),
            f"{row['loss_apart']:.1e}, {row['logps_apart']:.1e}" if has_both else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _pairs(side: dict[str, Any]) -> str:
    """Returns pairs a second, or why there are none."""
    if side["pairs_per_second"] is not None:
        return f"{side['pairs_per_second']:.3f}"
    failures = {trial["failure"] for trial in side["trials"] if trial["failure"]}
    reasons = sorted(failures) + ([side["stopped"]] if side["stopped"] else [])
    return "; ".join(reasons)


if __name__ == "__main__":
    main()
