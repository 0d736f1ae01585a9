"""From documents to a LongPO-trained Hugging Face model on a CPU: what `make quickstart` runs.

    python examples/quickstart/run.py [--nproc 2]

Every step is a command that is shown before it runs; afterwards this script checks what they
promise. Everything is written under outputs/quickstart, which git ignores.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = Path("outputs/quickstart")
MODEL = OUTPUT / "model"
EXPORTED = OUTPUT / "longpo-hf"

NUM_DOCUMENTS = 5
LEAST_PAIRS = 4
LEAST_STEPS = 3
LEAST_ROW_TOKENS = 2048
QUESTION = "In one sentence: what is a preference pair made of?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, default=1, help="processes that share each sequence")
    arguments = parser.parse_args()
    started = time.monotonic()
    before = tracked_changes()
    clear_old_results()
    make_model()
    python("tools/standard_library.py", OUTPUT / "documents", "--number", NUM_DOCUMENTS)
    longpo(
        "generate",
        *("--model", MODEL),
        *("--documents", OUTPUT / "documents"),
        *("--output", OUTPUT / "examples.jsonl"),
        *("--instructions", "template"),
        *("--turns", 2),
        *("--chunk_min_tokens", 300),
        *("--chunk_max_tokens", 600),
        *("--max_document_tokens", 2200),
        *("--max_new_tokens", 32),
    )
    longpo(
        "tokenize",
        *("--examples", OUTPUT / "examples.jsonl"),
        *("--output", OUTPUT / "rows.jsonl"),
        *("--tokenizer", MODEL),
    )
    longpo("inspect", OUTPUT / "rows.jsonl", "--tokenizer", MODEL)
    longpo("train", "--config", "examples/quickstart/config.yaml", *parallel(arguments.nproc))
    longpo("report", OUTPUT / "run")
    longpo("convert", "export", OUTPUT / "run" / "checkpoints", EXPORTED)
    check_rows()
    check_training()
    check_files(before)
    answer = ask(QUESTION)
    print(f"\nthe exported model, asked {QUESTION!r}:\n  {answer}")
    print(
        f"\nall checks passed in {time.monotonic() - started:.0f} s; look at\n"
        f"  {OUTPUT / 'examples.jsonl'}   pairs that the model wrote\n"
        f"  {OUTPUT / 'run/report.png'}   the plot\n"
        f"  {EXPORTED}   the trained model, for transformers"
    )


def longpo(*arguments: Any) -> None:
    run([sys.executable, "-m", "megatron_longpo", *map(str, arguments)], shown="longpo")


def python(*arguments: Any) -> None:
    run([sys.executable, *map(str, arguments)], shown="python")


def run(command: list[str], *, shown: str) -> None:
    """Shows a command as a user would type it, runs it, and ends with its exit code if it fails."""
    words = command[3:] if shown == "longpo" else command[1:]
    print(f"\n$ {shlex.join([shown, *words])}", flush=True)
    started = time.monotonic()
    # Threads that wait by spinning slow everything down on a machine that does other work too.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    finished = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)
    print(f"({time.monotonic() - started:.0f} s)", flush=True)


def parallel(num_processes: int) -> list[str]:
    """Options of a run that splits each sequence over processes; none for one process."""
    if num_processes == 1:
        return []
    return ["--nproc", str(num_processes), "--parallel.context", str(num_processes)]


def clear_old_results() -> None:
    """Removes what an earlier run left, but for the model, which never changes."""
    for path in (ROOT / OUTPUT).glob("*"):
        if path == ROOT / MODEL:
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_model() -> None:
    if (ROOT / MODEL / "model.safetensors").exists():
        print(f"{MODEL} is there from an earlier run")
        return
    python("tools/smollm2.py", MODEL, "--dtype", "fp32")


def check_rows() -> None:
    rows = read_jsonl(OUTPUT / "rows.jsonl")
    require(len(rows) >= LEAST_PAIRS, f"{len(rows)} pairs, expected {LEAST_PAIRS} or more")
    for row in rows:
        for branch in ("chosen", "rejected"):
            length = len(row[f"{branch}_input_ids"])
            require(
                length >= LEAST_ROW_TOKENS,
                f"{branch} row of {row['id']} has {length} tokens, expected {LEAST_ROW_TOKENS}",
            )
    for example in read_jsonl(OUTPUT / "examples.jsonl"):
        for turn in example["turns"]:
            require(bool(turn["chosen"].strip()), f"{example['id']} has an empty chosen answer")
            require(bool(turn["rejected"].strip()), f"{example['id']} has an empty rejected answer")


def check_training() -> None:
    metrics = read_jsonl(OUTPUT / "run" / "metrics.jsonl")
    steps = [row for row in metrics if "loss" in row]
    evaluations = [row for row in metrics if "eval/preference_loss" in row]
    require(len(steps) >= LEAST_STEPS, f"{len(steps)} optimizer steps, expected {LEAST_STEPS}")
    first, last = evaluations[0]["eval/preference_loss"], evaluations[-1]["eval/preference_loss"]
    print(f"\npreference loss of the same pairs: {first:.6f} before, {last:.6f} after")
    require(evaluations[0]["step"] == 0, "the pairs were not scored before the first step")
    require(evaluations[-1]["step"] == len(steps), "the pairs were not scored after the last step")
    require(last < first, "the preference loss of the same pairs did not fall")


def check_files(before: str) -> None:
    plot = ROOT / OUTPUT / "run" / "report.png"
    require(plot.is_file() and plot.stat().st_size > 10_000, f"{plot} is missing or empty")
    require(tracked_changes() == before, "a file that git tracks was changed")


def tracked_changes() -> str:
    """What git sees changed among tracked files; nothing outside a checkout."""
    command = ["git", "diff", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


def ask(question: str) -> str:
    """Loads the exported folder with plain transformers and lets it answer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / EXPORTED)
    model = AutoModelForCausalLM.from_pretrained(ROOT / EXPORTED, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(ROOT / MODEL, dtype=torch.float32)
    moved = sum(
        int(not torch.equal(after, before))
        for after, before in zip(model.parameters(), original.parameters(), strict=True)
    )
    require(moved > 0, "the exported weights are those of the original model")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    require(bool(answer.strip()), "the exported model gave no answer")
    return answer.strip()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / path).read_text(encoding="utf-8").splitlines()]


def require(holds: bool, problem: str) -> None:
    if not holds:
        sys.exit(f"quickstart: {problem}")


if __name__ == "__main__":
    main()
