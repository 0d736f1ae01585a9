"""Under torchrun: a run saved under one layout goes on under another, overlapped or not.

    torchrun --nproc-per-node 4 tests/training/layout_changes.py FOLDER

FOLDER is a `Shelf` whose models and rows are made already. Prints `same: FIRST -> SECOND` for each
change of layout after which the metrics are those of the run that went on.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_convert.torch_dist import TorchDistReader
from megatron_longpo.config.train import ParallelConfig
from megatron_longpo.parallel import groups
from megatron_longpo.training import loop
from tests.parity.harness import Shelf, policy_parameters
from tests.training.short_runs import CASE, metric_rows, short_config

TWO_LAYERS = replace(CASE, name="two_layers", policy=replace(CASE.policy, layers=2, tied=True))
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
ROUNDED = {"state_dtype": "bf16"}
STEPS, SAVED = 4, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    name: str
    parallel: ParallelConfig
    optimizer: dict[str, Any] = field(default_factory=dict)


INTERLEAVED = Layout(
    name="PP2xVPP2", parallel=ParallelConfig(pipeline=2, pipeline_layout="E|t|t|L")
)
OVERLAPPED = Layout(name="DP2 overlapped", parallel=ParallelConfig(), optimizer=OVERLAP)
TP2_PP2 = Layout(
    name="TP2xPP2",
    parallel=ParallelConfig(tensor=2, pipeline=2, sequence=True),
    optimizer=ROUNDED,
)
CP2_DP2 = Layout(name="CP2xDP2", parallel=ParallelConfig(context=2), optimizer=ROUNDED)
CHANGES = {
    2: (
        (INTERLEAVED, INTERLEAVED),
        (INTERLEAVED, OVERLAPPED),
        (OVERLAPPED, INTERLEAVED),
    ),
    4: (
        (TP2_PP2, TP2_PP2),
        (TP2_PP2, CP2_DP2),
        (CP2_DP2, CP2_DP2),
        (CP2_DP2, TP2_PP2),
    ),
}
"""By world size."""

TENSORS = (
    ("model.embed_tokens.weight", "embedding.word_embeddings.weight", None),
    ("model.layers.0.mlp.down_proj.weight", "decoder.layers.mlp.linear_fc2.weight", 0),
    ("model.layers.1.mlp.down_proj.weight", "decoder.layers.mlp.linear_fc2.weight", 1),
)
"""Hugging Face name, checkpoint key, layer."""


def run(
    shelf: Shelf, layout: Layout, folder: Path, *, resume: str = "auto"
) -> list[dict[str, Any]]:
    config = short_config(
        shelf,
        folder,
        case=TWO_LAYERS,
        steps=STEPS,
        data={"eval_path": shelf.rows_file(TWO_LAYERS)},
        optimizer={"eps": 1e-5, **layout.optimizer},
        checkpoint={"interval": SAVED, "resume": resume},
        parallel=layout.parallel,
    )
    prepared = loop.prepare(config)
    loop.train(prepared)
    saved = TorchDistReader(folder / "checkpoints" / f"iter_{STEPS:07d}")
    weights = policy_parameters(prepared)
    for name, key, layer in TENSORS:
        stored = saved.read(key, layer=layer)[: len(weights[name])]
        assert torch.equal(stored, weights[name]), f"{layout.name} saved an old {name}"
    return metric_rows(folder)


def compare(resumed: list[dict[str, Any]], straight: list[dict[str, Any]]) -> None:
    """Raises AssertionError where the resumed steps are not those of the run that went on."""
    # The last row is the evaluation's.
    expected = [row for row in straight if row["step"] > SAVED]
    assert [row["step"] for row in resumed] == [row["step"] for row in expected] == [3, 4, 4]
    for mine, theirs in zip(resumed, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def main() -> None:
    shelf = Shelf(Path(sys.argv[1]))
    torch.set_num_threads(1)
    straight: dict[str, list[dict[str, Any]]] = {}
    world_size = groups.initialize(groups.ParallelSizes(), timeout_minutes=2).world_size
    for first, second in CHANGES[world_size]:
        folder = shelf.root / first.name
        if first.name not in straight:
            straight[first.name] = run(shelf, first, folder)
        saved = folder / "checkpoints" / f"iter_{SAVED:07d}"
        resumed = run(
            shelf, second, shelf.root / f"{first.name} to {second.name}", resume=str(saved)
        )
        compare(resumed, straight[first.name])
        if first is second:
            went_on = [row for row in straight[first.name] if row["step"] > SAVED]
            assert resumed == went_on, "not bit for bit"
        if torch.distributed.get_rank() == 0:
            print(f"same: {first.name} -> {second.name}", flush=True)
    groups.shutdown()


if __name__ == "__main__":
    main()
