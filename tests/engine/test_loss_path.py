"""From scores to the loss in fp64: how pairs are put into microbatches changes no digit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_longpo.data.trees.packing import make_pack
from megatron_longpo.data.trees.tree import PairTrees, TreeConfig, pair_trees
from megatron_longpo.engine.schedule import _loss
from megatron_longpo.objectives import OBJECTIVES, Objective
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.parallel.layout import RankPack, lay_out_pack
from tests.data.trees.forests import preference_rows
from tests.objectives.logps import objective

quick = settings(max_examples=15, deadline=None, derandomize=True)


def tree_config_of(loss: Objective, *, share: bool) -> TreeConfig:
    needs = loss.needs
    return TreeConfig(
        policy=needs.policy,
        reference=needs.reference,
        nll=needs.nll,
        divergence=needs.divergence,
        share_prefix=share,
    )


def scores_of(trees: PairTrees, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random log-probs of the policy's and the reference's edges, and divergences, of one pair."""
    pack = lay_out_pack(make_pack([trees]), device=torch.device("cpu"))
    num_reference = 0 if pack.reference is None else len(pack.reference.edges.sources)

    def logps(count: int) -> Tensor:
        return -10 * torch.rand(count, generator=generator, dtype=torch.float64)

    return (
        logps(len(pack.policy.edges.sources)),
        logps(num_reference),
        -logps(len(pack.policy.divergence.sources)),
    )


def global_batch(
    pairs: Sequence[PairTrees],
    scores: Sequence[tuple[Tensor, Tensor, Tensor]],
    microbatches: Sequence[Sequence[int]],
    loss: Objective,
    groups: Groups,
) -> tuple[float, int, list[Tensor]]:
    """Loss sum, pairs and every pair's gradients, microbatch by microbatch."""
    leaves = [[part.clone().requires_grad_() for part in of_pair] for of_pair in scores]
    total, count = 0.0, 0
    for members in microbatches:
        pack: RankPack = lay_out_pack(
            make_pack([pairs[index] for index in members]), device=torch.device("cpu")
        )
        kinds: Any = zip(*(leaves[index] for index in members), strict=True)
        packed = torch.cat([torch.cat(kind) for kind in kinds])
        loss_sum, num_pairs, _ = _loss(packed, pack=pack, objective=loss, groups=groups)
        loss_sum.backward()
        total, count = total + float(loss_sum.detach()), count + int(num_pairs)
    gradients = []
    for of_pair in leaves:
        parts = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in of_pair]
        gradients.append(torch.cat(parts))
    return total, count, gradients


@pytest.mark.parametrize("turns", ["summed", "per_turn"])
@pytest.mark.parametrize("name", OBJECTIVES)
@quick
@given(
    rows=st.lists(preference_rows(), min_size=2, max_size=5), share=st.booleans(), data=st.data()
)
def test_microbatches_change_no_digit(
    name: str, turns: str, single_process: Groups, rows: Any, share: bool, data: st.DataObject
) -> None:
    loss = objective(name, turns=turns, nll_weight=0.0 if name == "opsdl" else 0.7)
    pairs = [pair_trees(row, tree_config_of(loss, share=share)) for row in rows]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    scores = [scores_of(trees, generator) for trees in pairs]
    order = data.draw(st.permutations(range(len(pairs))))
    cut = data.draw(st.integers(1, len(pairs)))
    together = global_batch(pairs, scores, [range(len(pairs))], loss, single_process)
    for microbatches in ([[index] for index in order], [order[:cut], order[cut:] or [0][:0]]):
        wanted = [members for members in microbatches if members]
        apart = global_batch(pairs, scores, wanted, loss, single_process)
        assert apart[1] == together[1] == len(pairs)
        assert apart[0] == pytest.approx(together[0], rel=1e-10, abs=1e-12)
        assert np.isfinite(apart[0])
        for mine, theirs in zip(apart[2], together[2], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
