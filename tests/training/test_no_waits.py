"""Forward, loss and backward never wait for a GPU: no operator of theirs needs to know values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_longpo.data.trees.packing import make_pack
from megatron_longpo.data.trees.tree import pair_trees
from megatron_longpo.engine.batches import rank_packs
from megatron_longpo.engine.schedule import _loss
from megatron_longpo.objectives import OBJECTIVES
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.parallel.layout import lay_out_pack
from megatron_longpo.training import loop
from tests.engine.test_loss_path import scores_of, tree_config_of
from tests.objectives.logps import objective
from tests.operators import Operators
from tests.parity.harness import Shelf
from tests.random_rows import random_row
from tests.training.short_runs import short_config


def test_operators_that_wait_are_seen() -> None:
    values = torch.arange(4.0)
    with Operators() as seen:
        values[values > 1] = values[values > 2].sum()
        values[torch.tensor([1, 2])] += 1
        if values.sum() > 1:
            values.nonzero()
    assert seen.waits == ["index", "index_put_", "_local_scalar_dense", "nonzero"]


@pytest.mark.parametrize("turns", ["summed", "per_turn"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_loss_waits(name: str, turns: str, single_process: Groups) -> None:
    loss = objective(name, turns=turns, nll_weight=0.0 if name == "opsdl" else 0.7)
    trees = [
        pair_trees(
            random_row(
                np.random.default_rng(num_turns),
                50,
                chosen_answer_lengths=(4, 1, 6)[:num_turns],
                rejected_answer_lengths=(3, 5, 2)[:num_turns],
            ),
            tree_config_of(loss, share=True),
        )
        for num_turns in (1, 2, 3)
    ]
    pack = lay_out_pack(make_pack(trees), device=torch.device("cpu"))
    scores = [scores_of(one, torch.Generator().manual_seed(0)) for one in trees]
    packed = torch.cat([torch.cat(kind) for kind in zip(*scores, strict=True)]).requires_grad_()
    with Operators() as seen:
        loss_sum, _, _ = _loss(packed, pack=pack, objective=loss, groups=single_process)
        loss_sum.backward()
    assert seen.names and not seen.waits
    assert packed.grad is not None and packed.grad.any()


def test_no_model_waits(shelf: Shelf, single_process: Groups, tmp_path: Path) -> None:
    run = loop.prepare(short_config(shelf, tmp_path))
    (pack,) = rank_packs(run.pairs, [0, 1], run.groups, budget_tokens=2000)
    (model,) = run.model
    model.train()
    with Operators() as seen:
        logps = model(pack)
        logps.sum().backward()
    assert len(seen.names) > 100 and not seen.waits
