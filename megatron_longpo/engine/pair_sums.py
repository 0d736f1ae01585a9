"""Sums the log-probs of edges into the per-turn sums that an objective takes.

Letters: N pairs of a microbatch, T most turns among them, K kinds of sums, e edges of this rank,
d places of this rank at which policy and reference are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_longpo.config.names import ROW_NAMES, RowName
from megatron_longpo.data.trees.forest import Term
from megatron_longpo.objectives import PairLogps
from megatron_longpo.parallel.collectives import sum_over
from megatron_longpo.parallel.layout import RankEdges, RankPack


def sum_pairs(scores: Tensor, pack: RankPack, *, context_group: ProcessGroup) -> PairLogps:
    """Returns sums by turn and pair, over all context-parallel ranks.

    Args:
        scores: [e + d] nats, as `scores.score_pack` returns them.
        pack: the microbatch that they belong to.
        context_group: ranks that hold the other edges of the same pairs.

    Returns:
        Sums in fp64: an objective subtracts numbers of up to 1e6 nats, which fp32 rounds to about
        a tenth.
    """
    policy = pack.policy
    num_reference_edges = 0 if pack.reference is None else len(pack.reference.edges.sources)
    policy_logps, reference_logps, divergences = scores.split(
        [len(policy.edges.sources), num_reference_edges, len(policy.divergence.sources)]
    )
    shape = pack.turn_mask.shape
    policy_terms = [term for term in pack.counts if term is not Term.DIVERGENCE]
    sums_KNT = [_turn_sums(policy_logps, policy.edges, policy_terms, shape)]
    if pack.reference is not None:
        edges = pack.reference.edges
        sums_KNT.append(_turn_sums(reference_logps.detach(), edges, pack.reference_terms, shape))
    # A divergence belongs to the pair, whichever turn a place is in: it is put into the first turn.
    first_turns = policy.divergence.pairs * shape[1]
    sums_KNT.append(binned(divergences[None], first_turns, shape))
    *sums, divergence_NT = sum_over(torch.cat(sums_KNT), context_group)
    by_policy_term: dict[Term, Tensor] = dict(zip(policy_terms, sums, strict=False))
    by_reference_term = dict(
        zip(pack.reference_terms, sums[len(policy_terms) :], strict=pack.reference is not None)
    )
    nothing_NT = torch.zeros_like(divergence_NT)
    no_tokens_NT = torch.zeros_like(pack.turn_mask, dtype=torch.int64)
    return PairLogps(
        policy=_by_row(by_policy_term),
        reference=_by_row({**by_reference_term, **pack.reference_logps}),
        token_counts=_by_row(pack.counts),
        turn_mask_NT=pack.turn_mask,
        # The NLL belongs to the pair too.
        nll_sum_N=-by_policy_term.get(Term.NLL, nothing_NT).sum(dim=1),
        nll_count_N=pack.counts.get(Term.NLL, no_tokens_NT).sum(dim=1),
        divergence_sum_N=divergence_NT.sum(dim=1),
        divergence_count_N=pack.counts.get(Term.DIVERGENCE, no_tokens_NT).sum(dim=1),
    )


def _by_row(by_term: Mapping[Term, Tensor]) -> dict[RowName, Tensor]:
    return {row: by_term[Term.of_row(row)] for row in ROW_NAMES if Term.of_row(row) in by_term}


def _turn_sums(logps: Tensor, edges: RankEdges, terms: Sequence[Term], shape: torch.Size) -> Tensor:
    """Sums log-probs by term and turn, [e] -> [K, N, T] in fp64.

    Selecting edges with a mask would make the CPU wait for the GPU, to know their number.
    """
    if not terms:
        return torch.zeros(0, *shape, dtype=torch.float64, device=logps.device)
    joins = torch.stack([edges.terms & int(term) for term in terms]) != 0
    bins = edges.pairs * shape[1] + edges.turns
    return binned(torch.where(joins, logps.double(), 0.0), bins, shape)


def binned(values: Tensor, bins: Tensor, shape: torch.Size) -> Tensor:
    """Sums values [K, e] into flat bins [e] of `shape`, -> [K, *shape] in fp64."""
    sums = torch.zeros(len(values), shape.numel(), dtype=torch.float64, device=values.device)
    return sums.index_add(1, bins, values.double()).view(-1, *shape)
