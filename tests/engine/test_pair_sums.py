"""Edges are added up into turns and pairs; the numbers are worked out by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_longpo.data.trees.forest import Term
from megatron_longpo.engine.pair_sums import sum_pairs
from megatron_longpo.parallel.attention_plan import AttentionPlan
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.parallel.layout import (
    DivergenceEdges,
    RankEdges,
    RankPack,
    RankTokens,
)

C, R, N = int(Term.LONG_CHOSEN), int(Term.LONG_REJECTED), int(Term.NLL)
SHORT_C, SHORT_R = int(Term.SHORT_CHOSEN), int(Term.SHORT_REJECTED)
SHORT = (Term.SHORT_CHOSEN, Term.SHORT_REJECTED)


def tokens_with_edges(
    edges: list[tuple[int, int, int]], *, compared_pairs: list[int] | None = None
) -> RankTokens:
    """(pair, turn, terms) of each edge; sources and targets play no part in sums.

    `compared_pairs` are the pairs of the places where policy and reference are compared.
    """
    pairs, turns, terms = torch.tensor(edges, dtype=torch.int64).reshape(-1, 3).T
    anything = torch.zeros(len(edges), dtype=torch.int64)
    return RankTokens(
        input_ids=anything,
        position_ids=anything,
        attention=AttentionPlan.of((), order=None, device=anything.device),
        edges=RankEdges(
            sources=anything,
            sources_on_host=anything.numpy(),
            targets=anything,
            pairs=pairs,
            turns=turns,
            terms=terms,
        ),
        divergence=DivergenceEdges(
            sources=torch.zeros(len(compared_pairs or []), dtype=torch.int64),
            slots=torch.arange(len(compared_pairs or [])),
            pairs=torch.tensor(compared_pairs or [], dtype=torch.int64),
            num_slots=len(compared_pairs or []),
        ),
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
REFERENCE_EDGES = [(0, 0, SHORT_C), (0, 1, SHORT_C | SHORT_R), (1, 0, SHORT_R)]
COUNTS = {
    Term.LONG_CHOSEN: torch.tensor([[2, 0], [1, 0]]),
    Term.LONG_REJECTED: torch.tensor([[1, 1], [1, 0]]),
    Term.NLL: torch.tensor([[2, 0], [2, 0]]),
}


def pack(*, with_reference: bool = True) -> RankPack:
    return RankPack(
        policy=tokens_with_edges(POLICY_EDGES),
        reference=tokens_with_edges(REFERENCE_EDGES) if with_reference else None,
        turn_mask=torch.tensor([[True, True], [True, False]]),
        reference_terms=SHORT if with_reference else (),
        counts=COUNTS,
        weights=torch.tensor([1, 1]),
    )


LOGPS = [-1.0, -2.0, -4.0, -8.0, -16.0, -32.0, -64.0, -0.5, -0.25, -0.125]
"""Seven of the policy, three of the reference; powers of two, so that a sum tells its parts."""


def test_an_edge_joins_the_sums_of_its_terms(single_process: Groups) -> None:
    sums = sum_pairs(torch.tensor(LOGPS), pack(), context_group=single_process.context)
    assert sums.policy["long_chosen"].tolist() == [[-6.0, 0.0], [-32.0, 0.0]]
    assert sums.policy["long_rejected"].tolist() == [[-4.0, -8.0], [-16.0, 0.0]]
    assert sums.reference["short_chosen"].tolist() == [[-0.5, -0.25], [0.0, 0.0]]
    assert sums.reference["short_rejected"].tolist() == [[0.0, -0.25], [-0.125, 0.0]]
    assert sums.nll_sum_N.tolist() == [3.0, 96.0]
    assert sums.nll_count_N.tolist() == [2, 2]
    assert sums.turn_mask_NT.tolist() == [[True, True], [True, False]]


def test_only_the_policys_edges_get_a_gradient(single_process: Groups) -> None:
    logps = torch.tensor(LOGPS, requires_grad=True)
    sums = sum_pairs(logps, pack(), context_group=single_process.context)
    total = sums.policy["long_chosen"].sum() + 10 * sums.policy["long_rejected"].sum()
    total = total + 100 * sums.nll_sum_N.sum() + 1000 * sums.reference["short_chosen"].sum()
    (gradient,) = torch.autograd.grad(total, logps)
    assert gradient.tolist() == [-100.0, -99.0, 11.0, 10.0, 10.0, -99.0, -100.0, 0.0, 0.0, 0.0]


def test_without_reference_rows_there_are_no_reference_sums(single_process: Groups) -> None:
    sums = sum_pairs(
        torch.tensor(LOGPS[:7]), pack(with_reference=False), context_group=single_process.context
    )
    assert sums.reference == {}
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
            reference_terms=(),
            counts={Term.LONG_CHOSEN: torch.tensor([[count]])},
            weights=torch.tensor([1]),
        ),
        context_group=single_process.context,
    )
    assert sums.policy["long_chosen"].item() == pytest.approx(-1e4, rel=1e-7)
    assert sums.policy["long_chosen"].dtype == torch.float64


def test_divergences_are_summed_by_pair(single_process: Groups) -> None:
    """They come after the edges of policy and reference."""
    pack = RankPack(
        policy=tokens_with_edges([(0, 0, C)], compared_pairs=[0, 1, 1]),
        reference=tokens_with_edges([(0, 0, SHORT_C)], compared_pairs=[0, 1, 1]),
        reference_terms=(Term.SHORT_CHOSEN,),
        counts={
            Term.LONG_CHOSEN: torch.tensor([[1], [0]]),
            Term.DIVERGENCE: torch.tensor([[1], [2]]),
        },
        turn_mask=torch.tensor([[True], [True]]),
        weights=torch.tensor([1, 1]),
    )
    scores = torch.tensor([-1.0, -2.0, 4.0, 8.0, 16.0], requires_grad=True)
    sums = sum_pairs(scores, pack, context_group=single_process.context)
    assert sums.policy["long_chosen"].tolist() == [[-1.0], [0.0]]
    assert sums.reference["short_chosen"].tolist() == [[-2.0], [0.0]]
    assert sums.token_counts.keys() == {"long_chosen"}
    assert sums.divergence_sum_N.tolist() == [4.0, 24.0]
    assert sums.divergence_count_N.tolist() == [1, 2]
    assert sums.nll_count_N.tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(sums.divergence_sum_N[1], scores)
    assert gradient.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]
