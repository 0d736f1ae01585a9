"""Memory and time of a training step with the reference online, offloaded and cached.

    python tools/bench_reference.py
    python tools/bench_reference.py --layers 16 --hidden 2048 --ffn 8192 --heads 16 --dtype bf16 \\
        --document 16384 --context long

Random weights, one pair a step. Every mode runs in a process of its own, so that its peak is its
own: GPU memory, or without a GPU the process's. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_longpo.config.train import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    ObjectiveConfig,
    ReferenceConfig,
    RunConfig,
    TrainConfig,
    resolve,
    resolve_reference,
)
from megatron_longpo.data.rows.schema import IGNORED_LABEL, PreferenceRow, TokenRow
from megatron_longpo.data.rows.writing import write_rows_jsonl
from megatron_longpo.engine.metrics import peak_memory_gib
from megatron_longpo.reference import run as reference_pass
from megatron_longpo.training import loop
from tools.tiny_models import make_tiny_model

MODES = ("online", "offload", "cached", "none")


def main() -> None:
    arguments = parse_arguments()
    if arguments.mode is not None:
        print(json.dumps(measured(arguments, Path(arguments.folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(arguments, Path(folder))
        print("| `reference.mode` | step, s | peak, GiB | loss |\n|---|---|---|---|")
        for mode in ("reference", *MODES):
            command = [sys.executable, __file__, *sys.argv[1:], "--mode", mode, "--folder", folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            row = json.loads(done.stdout.splitlines()[-1])
            name = "(`longpo reference`, whole, a row)" if mode == "reference" else mode
            print(f"| {name} | {row['seconds']:.3g} | {row['peak_gib']:.3g} | {row['loss']} |")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=1408)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--document", type=int, default=2048, help="tokens before the answers")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of the short chunk")
    parser.add_argument("--answer", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--context", choices=("short", "long"), default="short")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=4, help="the first is not counted")
    parser.add_argument("--mode", choices=("reference", *MODES), help="one mode alone")
    parser.add_argument("--folder", help="where model and rows are, with --mode")
    return parser.parse_args()


def make_inputs(arguments: argparse.Namespace, folder: Path) -> None:
    make_tiny_model(
        "llama",
        folder / "model",
        tied=True,
        vocab_size=arguments.vocabulary,
        layers=arguments.layers,
        hidden=arguments.hidden,
        ffn=arguments.ffn,
        heads=arguments.heads,
        kv_heads=arguments.heads,
        max_positions=2 * arguments.document,
        dtype=torch.bfloat16 if arguments.dtype == "bf16" else torch.float32,
    )
    rng = np.random.default_rng(0)
    write_rows_jsonl(
        folder / "rows.jsonl", [random_pair(rng, arguments) for _ in range(arguments.steps)]
    )


def random_pair(rng: np.random.Generator, arguments: argparse.Namespace) -> PreferenceRow:
    """Returns a pair: one document, a chunk, and the answers of one question."""

    def tokens(count: int) -> np.ndarray:
        return rng.integers(0, arguments.vocabulary, count)

    def row(prompt: np.ndarray, answer: np.ndarray) -> TokenRow:
        unlabelled = np.full(len(prompt), IGNORED_LABEL)
        return TokenRow(
            input_ids=np.concatenate([prompt, answer]), labels=np.concatenate([unlabelled, answer])
        )

    document, chunk = tokens(arguments.document), tokens(arguments.chunk)
    chosen, rejected = tokens(arguments.answer), tokens(arguments.answer)
    return PreferenceRow(
        id="bench",
        source="bench",
        chosen=row(document, chosen),
        rejected=row(document, rejected),
        reference_chosen=(row(chunk, chosen),),
        reference_rejected=(row(chunk, rejected),),
    )


def measured(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Returns seconds of a step (median) or of the reference pass, peak memory and loss."""
    config = settings(arguments, folder)
    if arguments.mode == "reference":
        return measured_reference(config, num_rows=arguments.steps)
    run = loop.prepare(config)
    steps = [loop.train_step(run) for _ in range(arguments.steps)]
    seconds = [step["step_time_s"] for step in steps[1:]]
    return {
        "seconds": statistics.median(value for value in seconds if value is not None),
        "peak_gib": peak_memory_gib(),
        "loss": steps[-1]["loss"],
    }


def measured_reference(config: TrainConfig, *, num_rows: int) -> dict[str, Any]:
    started = time.perf_counter()
    reference_pass.compute(resolve_reference(config))
    seconds = (time.perf_counter() - started) / num_rows
    return {"seconds": seconds, "peak_gib": peak_memory_gib(), "loss": "-"}


def settings(arguments: argparse.Namespace, folder: Path) -> TrainConfig:
    mode = {"reference": "cached", "offload": "online"}.get(arguments.mode, arguments.mode)
    return resolve(
        TrainConfig(
            model=ModelConfig(hf_path=str(folder / "model"), dtype=arguments.dtype),
            reference=ReferenceConfig(
                mode=mode,
                context=arguments.context,
                offload=arguments.mode == "offload",
            ),
            data=DataConfig(path=str(folder / "rows.jsonl"), max_length=2 * arguments.document),
            objective=ObjectiveConfig(name="longpo"),
            train=RunConfig(global_batch_pairs=1, recompute="full"),
            checkpoint=CheckpointConfig(interval=0),
            logging=LoggingConfig(dir=str(folder / "run"), tensorboard=False),
        )
    )


if __name__ == "__main__":
    main()
