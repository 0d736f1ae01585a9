"""The same settings give the same bits, and a changed global batch goes on where the data stood."""

from __future__ import annotations

from pathlib import Path

from megatron_longpo.parallel.groups import Groups
from megatron_longpo.training import loop
from tests.parity.harness import Shelf
from tests.training.short_runs import NUM_PAIRS, metric_rows, short_config


def test_one_process_repeats_itself_bit_for_bit(
    shelf: Shelf, tmp_path: Path, single_process: Groups
) -> None:
    """Ranks do too: see layout_changes.py."""
    runs = []
    for name in ("first", "second"):
        config = short_config(shelf, tmp_path / name, train={"recompute": "selective"})
        loop.train(loop.prepare(config))
        runs.append(metric_rows(tmp_path / name))
    assert runs[0] == runs[1] and len(runs[0]) == 4
    other = short_config(shelf, tmp_path / "other", data={"seed": 1})
    loop.train(loop.prepare(other))
    assert metric_rows(tmp_path / "other") != runs[0]


def test_another_global_batch_goes_on_with_the_pairs_that_are_left(
    shelf: Shelf, tmp_path: Path, single_process: Groups
) -> None:
    """Ten pairs, two a step; from step two on three a step, so that two steps are left."""
    loop.train(
        loop.prepare(
            short_config(
                shelf,
                tmp_path / "twos",
                steps=None,
                train={"global_batch_pairs": 2},
                checkpoint={"interval": 2, "keep": 9},
            )
        )
    )
    twos = metric_rows(tmp_path / "twos")
    assert [row["consumed_pairs"] for row in twos] == [2, 4, 6, 8, 10]
    saved = tmp_path / "twos" / "checkpoints" / "iter_0000002"
    loop.train(
        loop.prepare(
            short_config(
                shelf,
                tmp_path / "threes",
                steps=None,
                train={"global_batch_pairs": 3},
                checkpoint={"resume": str(saved)},
            )
        )
    )
    threes = metric_rows(tmp_path / "threes")
    assert [row["step"] for row in threes] == [3, 4]
    assert [row["consumed_pairs"] for row in threes] == [7, NUM_PAIRS]
    # The same six pairs, by what can be counted of them.
    for key in ("tokens", "unshared_tokens", "reference_tokens"):
        assert sum(row[key] for row in threes) == sum(row[key] for row in twos[2:])
    assert threes[-1]["learning_rate"] < threes[0]["learning_rate"]
