"""How the tokens and edges of a forest are dealt to ranks. What tokens attend: attention_plan.py.

`RankTokens` is all that the model sees of a forest, `RankPack` all that it sees of a microbatch.

Letters: t tokens on this rank, padding included; e edges whose source is on this rank; d places of
this rank where policy and reference are compared.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_longpo.data.trees.forest import Forest, Term, divergence_edges
from megatron_longpo.data.trees.packing import Pack
from megatron_longpo.parallel.attention_plan import (
    AttentionPlan,
    Span,
    TokenOrder,
    append_span,
    attention_runs,
    query_pieces,
)
from megatron_longpo.parallel.transfer import to_device


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEdges:
    """Edges that sum log-probabilities and whose source token is on this rank."""

    sources: torch.Tensor
    """[e] int64; indices into this rank's tokens."""
    sources_on_host: np.ndarray
    """[e] int64; the same. Decisions are made from these: reading `sources` back would wait for the
    GPU."""
    targets: torch.Tensor
    """[e] int64."""
    pairs: torch.Tensor
    """[e] int64."""
    turns: torch.Tensor
    """[e] int64."""
    terms: torch.Tensor
    """[e] int64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DivergenceEdges:
    """Places of this rank where policy and reference are compared: `forest.divergence_edges`."""

    sources: torch.Tensor
    """[d] int64; indices into this rank's tokens."""
    slots: torch.Tensor
    """[d] int64; number of each place in the whole pack: the same in policy and reference."""
    pairs: torch.Tensor
    """[d] int64."""
    num_slots: int
    """Places of the whole pack, over all ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankTokens:
    """A forest as one rank holds it."""

    input_ids: torch.Tensor
    """[t] int64; padding is token 0, at the end. It attends nothing, and nothing attends it."""
    position_ids: torch.Tensor
    """[t] int64."""
    attention: AttentionPlan
    edges: RankEdges
    divergence: DivergenceEdges

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLayout:
    """How a forest's tokens are dealt to the ranks of a context-parallel group.

    Each segment is cut into twice as many chunks as there are ranks. Rank r takes chunks r and
    2 * ranks - 1 - r, an early one and its late counterpart, so that causal work balances in every
    segment. Dealing the flat pack instead would put all answers on one rank.

    Where neighbouring ranks scatter heads among themselves (`a2a`), each of them attends with the
    tokens of all of them. Those, too, are an early part of every segment and its late counterpart:
    what one rank would hold if there were as many ranks as such groups.
    """

    spans: tuple[tuple[Span, ...], ...]
    """For every rank its spans of the flat forest, ascending; adjacent ones are joined."""
    num_local: int
    """Tokens that every rank holds, padding included."""

    @staticmethod
    def of(forest: Forest, *, num_ranks: int, multiple: int) -> TokenLayout:
        """Deals the tokens and pads all ranks to the same number, a multiple of `multiple`."""
        dealt: list[list[Span]] = [[] for _ in range(num_ranks)]
        for start, length in zip(
            forest.segment_starts.tolist(), forest.segment_lengths.tolist(), strict=True
        ):
            cuts = [start + length * i // (2 * num_ranks) for i in range(2 * num_ranks + 1)]
            for rank, spans in enumerate(dealt):
                for chunk in (rank, 2 * num_ranks - 1 - rank):
                    append_span(spans, Span(cuts[chunk], cuts[chunk + 1]))
        longest = max(sum(map(len, spans)) for spans in dealt)
        return TokenLayout(
            spans=tuple(map(tuple, dealt)), num_local=-(-longest // multiple) * multiple
        )

    def tokens(self, rank: int) -> np.ndarray:
        """Returns the flat indices of a rank's tokens, in its order, without padding."""
        ranges = [np.arange(span.start, span.stop) for span in self.spans[rank]]
        return np.concatenate([np.empty(0, dtype=np.int64), *ranges])

    def joint_spans(self, ranks: Sequence[int]) -> list[Span]:
        """Returns the spans of several ranks together, ascending; adjacent ones are joined."""
        joint: list[Span] = []
        for span in sorted(
            (span for rank in ranks for span in self.spans[rank]), key=lambda span: span.start
        ):
            append_span(joint, span)
        return joint

    def order(self, ranks: Sequence[int]) -> np.ndarray:
        """Returns the index of each token, ascending, in these ranks' tokens with padding."""
        tokens = [self.tokens(rank) for rank in ranks]
        places = [
            number * self.num_local + np.arange(len(of_rank))
            for number, of_rank in enumerate(tokens)
        ]
        return np.concatenate(places)[np.argsort(np.concatenate(tokens))]


def lay_out(
    forest: Forest,
    *,
    device: torch.device,
    multiple: int = 1,
    context_rank: int = 0,
    context_size: int = 1,
    context_inner: int = 1,
) -> RankTokens:
    """Returns a rank's tokens of a forest.

    Args:
        forest: a pack's policy or reference forest.
        device: where the tensors go.
        multiple: the number of tokens is padded to a multiple of it (sequence parallelism).
        context_rank: this rank in its context-parallel group.
        context_size: ranks of that group.
        context_inner: neighbouring ranks that scatter heads: attention sees the tokens of all of
            them, for some heads. 1 = none do, `context_size` = all do.
    """
    layout = TokenLayout.of(forest, num_ranks=context_size, multiple=multiple)
    tokens = layout.tokens(context_rank)
    padding = layout.num_local - len(tokens)
    local_index = np.full(forest.num_tokens, -1, dtype=np.int64)
    local_index[tokens] = np.arange(len(tokens))
    edge_sources = local_index[forest.edge_sources]
    is_here = (edge_sources >= 0) & ((forest.edge_terms & ~Term.DIVERGENCE) != 0)
    compared = divergence_edges(forest)
    slots = np.flatnonzero(edge_sources[compared] >= 0)
    compared_here = compared[slots]

    on_device = functools.partial(to_device, device=device)
    first = context_rank - context_rank % context_inner
    inner_ranks = range(first, first + context_inner)
    order = None
    if context_size > 1:
        order = TokenOrder(
            all=on_device(layout.order(range(context_size))),
            inner=on_device(layout.order(inner_ranks)),
        )
    pieces = query_pieces(attention_runs(forest), layout.joint_spans(inner_ranks))
    return RankTokens(
        input_ids=on_device(np.pad(forest.input_ids[tokens], (0, padding))),
        position_ids=on_device(np.pad(forest.position_ids[tokens], (0, padding))),
        attention=AttentionPlan.of(pieces, order=order, device=device),
        edges=RankEdges(
            sources=on_device(edge_sources[is_here]),
            sources_on_host=edge_sources[is_here],
            targets=on_device(forest.edge_targets[is_here]),
            pairs=on_device(forest.edge_pairs[is_here]),
            turns=on_device(forest.edge_turns[is_here]),
            terms=on_device(forest.edge_terms[is_here]),
        ),
        divergence=DivergenceEdges(
            sources=on_device(edge_sources[compared_here]),
            slots=on_device(slots),
            pairs=on_device(forest.edge_pairs[compared_here]),
            num_slots=len(compared),
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPack:
    """One microbatch as one rank holds it. Letters: N pairs, T largest number of turns."""

    policy: RankTokens
    reference: RankTokens | None
    reference_terms: tuple[Term, ...]
    """The sums to which the reference's edges add."""
    turn_mask: torch.Tensor
    """[N, T] bool; True where the pair has that turn."""
    counts: Mapping[Term, torch.Tensor]
    """For each of the policy's terms [N, T] int64: how many tokens its sums are over, on all ranks
    together."""
    weights: torch.Tensor
    """[N] int64; 0 for a filler's pair, else 1."""
    reference_logps: Mapping[Term, torch.Tensor] = field(default_factory=dict)
    """For each sum of the reference that was computed ahead [N, T] float64, nats."""


def lay_out_pack(
    pack: Pack,
    *,
    device: torch.device,
    multiple: int = 1,
    context_rank: int = 0,
    context_size: int = 1,
    context_inner: int = 1,
) -> RankPack:
    """Returns a rank's part of a microbatch; the arguments are those of `lay_out`.

    Policy and reference are dealt and padded separately, since a pipeline stage sends them side by
    side and sequence parallelism shards each.
    """
    place = functools.partial(
        lay_out,
        device=device,
        multiple=multiple,
        context_rank=context_rank,
        context_size=context_size,
        context_inner=context_inner,
    )
    on_device = functools.partial(to_device, device=device)
    turns = np.arange(int(pack.turn_counts.max()))
    return RankPack(
        policy=place(pack.policy),
        reference=None if pack.reference is None else place(pack.reference),
        reference_terms=pack.reference_terms,
        turn_mask=on_device(turns < pack.turn_counts[:, None]),
        counts={term: on_device(counts) for term, counts in pack.counts.items()},
        weights=on_device(pack.weights),
        reference_logps={term: on_device(logps) for term, logps in pack.reference_logps.items()},
    )
