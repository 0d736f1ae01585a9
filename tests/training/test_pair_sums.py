"""Edges are added up into turns and pairs; the numbers are worked out by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_longpo.data.tree import Term
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.parallel.layout import AttentionPlan, RankEdges, RankPack, RankTokens
from megatron_longpo.training.pair_sums import sum_pairs

C, R, N = int(Term.CHOSEN), int(Term.REJECTED), int(Term.NLL)


def tokens_with_edges(edges: list[tuple[int, int, int]]) -> RankTokens:
    """(pair, turn, terms) of each edge; sources and targets play no part in sums."""
    pairs, turns, terms = torch.tensor(edges, dtype=torch.int64).reshape(-1, 3).T
    anything = torch.zeros(len(edges), dtype=torch.int64)
    return RankTokens(
        input_ids=anything,
        position_ids=anything,
        attention=AttentionPlan(pieces=(), order=None),
        edges=RankEdges(sources=anything, targets=anything, pairs=pairs, turns=turns, terms=terms),
    )


POLICY_EDGES = [
    (0, 0, N),
    (0, 0, C | N),
    (0, 0, C | R),
    (0, 1, R),
    (1, 0, R),
    (1, 0, C | N),
    (1, 0, N),
]
REFERENCE_EDGES = [(0, 0, C), (0, 1, C | R), (1, 0, R)]


def pack(*, with_reference: bool = True) -> RankPack:
    return RankPack(
        policy=tokens_with_edges(POLICY_EDGES),
        reference=tokens_with_edges(REFERENCE_EDGES) if with_reference else None,
        turn_mask=torch.tensor([[True, True], [True, False]]),
        nll_counts=torch.tensor([2, 2]),
        weights=torch.tensor([1, 1]),
    )


LOGPS = [-1.0, -2.0, -4.0, -8.0, -16.0, -32.0, -64.0, -0.5, -0.25, -0.125]
"""Seven of the policy, three of the reference; powers of two, so that a sum tells its parts."""


def test_an_edge_joins_the_sums_of_its_terms(single_process: Groups) -> None:
    sums = sum_pairs(torch.tensor(LOGPS), pack(), context_group=single_process.context)
    assert sums.policy_chosen_NT.tolist() == [[-6.0, 0.0], [-32.0, 0.0]]
    assert sums.policy_rejected_NT.tolist() == [[-4.0, -8.0], [-16.0, 0.0]]
    assert sums.reference_chosen_NT is not None and sums.reference_rejected_NT is not None
    assert sums.reference_chosen_NT.tolist() == [[-0.5, -0.25], [0.0, 0.0]]
    assert sums.reference_rejected_NT.tolist() == [[0.0, -0.25], [-0.125, 0.0]]
    assert sums.nll_sum_N.tolist() == [3.0, 96.0]
    assert sums.nll_count_N.tolist() == [2, 2]
    assert sums.turn_mask_NT.tolist() == [[True, True], [True, False]]


def test_only_the_policys_edges_get_a_gradient(single_process: Groups) -> None:
    logps = torch.tensor(LOGPS, requires_grad=True)
    sums = sum_pairs(logps, pack(), context_group=single_process.context)
    assert sums.reference_chosen_NT is not None
    total = sums.policy_chosen_NT.sum() + 10 * sums.policy_rejected_NT.sum()
    total = total + 100 * sums.nll_sum_N.sum() + 1000 * sums.reference_chosen_NT.sum()
    (gradient,) = torch.autograd.grad(total, logps)
    assert gradient.tolist() == [-100.0, -99.0, 11.0, 10.0, 10.0, -99.0, -100.0, 0.0, 0.0, 0.0]


def test_without_reference_rows_there_are_no_reference_sums(single_process: Groups) -> None:
    sums = sum_pairs(
        torch.tensor(LOGPS[:7]), pack(with_reference=False), context_group=single_process.context
    )
    assert sums.reference_chosen_NT is None and sums.reference_rejected_NT is None
    assert sums.nll_sum_N.tolist() == [3.0, 96.0]


def test_sums_of_many_small_numbers_are_exact(single_process: Groups) -> None:
    """In fp32 a hundred thousand tokens of -0.1 would be off by a nat."""
    count = 100_000
    sums = sum_pairs(
        torch.full((count,), -0.1),
        RankPack(
            policy=tokens_with_edges([(0, 0, C)] * count),
            reference=None,
            turn_mask=torch.tensor([[True]]),
            nll_counts=torch.tensor([0]),
            weights=torch.tensor([1]),
        ),
        context_group=single_process.context,
    )
    assert sums.policy_chosen_NT.item() == pytest.approx(-1e4, rel=1e-7)
    assert sums.policy_chosen_NT.dtype == torch.float64
