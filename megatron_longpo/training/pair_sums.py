"""From log-probabilities of edges to the sums that an objective takes.

Letters: N pairs of a microbatch, T most turns among them, e edges of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_longpo.data.tree import Term
from megatron_longpo.objectives import PairLogps
from megatron_longpo.parallel.collectives import sum_over
from megatron_longpo.parallel.layout import RankEdges, RankPack


def sum_pairs(logps: Tensor, pack: RankPack, *, context_group: ProcessGroup) -> PairLogps:
    """Sums edges into turns and pairs, over all context-parallel ranks.

    Args:
        logps: [e] nats; the policy's edges, then the reference's.
        pack: the microbatch that they belong to.
        context_group: ranks that hold the other edges of the same pairs.

    Returns:
        Sums in fp64: an objective subtracts numbers of up to 1e6 nats, where fp32 has no digit
        left behind the point.
    """
    num_policy_edges = len(pack.policy.edges.sources)
    policy_logps, reference_logps = logps[:num_policy_edges], logps[num_policy_edges:]
    shape = pack.turn_mask.shape
    sums = [
        _turn_sums(policy_logps, pack.policy.edges, Term.CHOSEN, shape),
        _turn_sums(policy_logps, pack.policy.edges, Term.REJECTED, shape),
        # The NLL is of the pair, whichever turn an edge is in.
        -_turn_sums(policy_logps, pack.policy.edges, Term.NLL, shape),
    ]
    if pack.reference is not None:
        detached = reference_logps.detach()
        sums += [
            _turn_sums(detached, pack.reference.edges, Term.CHOSEN, shape),
            _turn_sums(detached, pack.reference.edges, Term.REJECTED, shape),
        ]
    chosen, rejected, nll, *reference = sum_over(torch.stack(sums), context_group)
    return PairLogps(
        policy_chosen_NT=chosen,
        policy_rejected_NT=rejected,
        reference_chosen_NT=reference[0] if reference else None,
        reference_rejected_NT=reference[1] if reference else None,
        turn_mask_NT=pack.turn_mask,
        nll_sum_N=nll.sum(dim=1),
        nll_count_N=pack.nll_counts,
    )


def _turn_sums(logps: Tensor, edges: RankEdges, term: Term, shape: torch.Size) -> Tensor:
    """[e] -> [N, T] in fp64."""
    num_turns = shape[1]
    joins = (edges.terms & int(term)) != 0
    sums = torch.zeros(shape.numel(), dtype=torch.float64, device=logps.device)
    bins = edges.pairs[joins] * num_turns + edges.turns[joins]
    return sums.index_add(0, bins, logps[joins].double()).view(shape)
