"""How the tokens of a forest lie on this rank, and what each of them attends.

`RankTokens` is all that the model sees of a pack. A *run* is a maximal chain of first children:
contiguous in the flat order, so its tokens attend each other in ordinary causal attention. What a
run hangs on, its ancestors, it attends whole. Every tree is thus two kinds of calls to a stock
kernel, square causal ones and full rectangles, and no mask.

Letters: t tokens on this rank, padding included; e edges whose source is on this rank.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_longpo.data.trees.forest import NO_PARENT, Forest, Term, divergence_edges
from megatron_longpo.data.trees.packing import Pack


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, stop)."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryPiece:
    """Neighbouring queries of one run: each attends `context` whole and the piece causally."""

    queries: Span
    """Of the tokens that this rank's kernels see as queries."""
    own_keys: Span
    """The same tokens among the keys."""
    context: tuple[Span, ...]
    """Keys before the piece, in the order of the row: ancestors, then the run's earlier tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenOrder:
    """Where tokens stand in the ranks' tokens one behind the other, padding included."""

    all: torch.Tensor
    """[T] int64: each token of the flat forest, among those of all ranks."""
    inner: torch.Tensor
    """[q] int64: each token of the ranks that scatter heads, among theirs; the order of queries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPlan:
    """What attends what. Rides through Megatron's layers as their `packed_seq_params`."""

    pieces: tuple[QueryPiece, ...]
    """Over queries in the order of `order.inner`, one behind the other from the first query on, and
    over the keys of the flat forest."""
    order: TokenOrder | None
    """None where there is one rank."""
    lengths: tuple[int, ...]
    """Queries of each piece."""
    own_keys: slice | torch.Tensor
    """The keys of all pieces' own, one piece behind the other: a slice where they are neighbours,
    else [sum of lengths] int64."""
    adds_once: bool
    """Whether no query and no key has more than one part of its gradient besides the own one."""
    qkv_format: str = field(default="sbhd", init=False)
    """Megatron then takes our positions as they are, instead of deriving some from lengths."""

    @staticmethod
    def of(
        pieces: Sequence[QueryPiece], *, order: TokenOrder | None, device: torch.device
    ) -> AttentionPlan:
        """What all layers share is worked out here, once; tensors go to `device`."""
        joint: list[Span] = []
        for piece in pieces:
            _append(joint, piece.own_keys)
        if len(joint) > 1:
            own = np.concatenate([np.arange(span.start, span.stop) for span in joint])
            own_keys: slice | torch.Tensor = to_device(own, device)
        else:
            own_keys = slice(joint[0].start, joint[0].stop) if joint else slice(0, 0)
        contexts = sorted(
            (span for piece in pieces for span in piece.context), key=lambda span: span.start
        )
        are_apart = all(one.stop <= next.start for one, next in itertools.pairwise(contexts))
        return AttentionPlan(
            pieces=tuple(pieces),
            order=order,
            lengths=tuple(len(piece.queries) for piece in pieces),
            own_keys=own_keys,
            adds_once=are_apart and all(len(piece.context) <= 1 for piece in pieces),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEdges:
    """Edges that sum log-probabilities and whose source token is on this rank."""

    sources: torch.Tensor
    """[e] int64; indices into this rank's tokens."""
    sources_on_host: np.ndarray
    """[e] int64; the same. What is decided by them is decided here: reading them back would wait
    for the GPU."""
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
    """Places of this rank where policy and reference are compared, see `tree.divergence_edges`."""

    sources: torch.Tensor
    """[d] int64; indices into this rank's tokens."""
    slots: torch.Tensor
    """[d] int64; which place of the whole pack each is: the same in policy and reference."""
    pairs: torch.Tensor
    """[d] int64."""
    num_slots: int
    """Places of the whole pack, over all ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankTokens:
    """A forest as one rank holds it."""

    input_ids: torch.Tensor
    """[t] int64; padding is token 0, at the end, attended by nothing and attending nothing."""
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

    Each segment is cut into twice as many chunks as there are ranks; rank r takes chunks r and
    2 * ranks - 1 - r, an early one and its late counterpart, so that causal work balances in every
    segment. Dealing the flat pack instead would put all answers on one rank.

    Where neighbouring ranks scatter heads among themselves (`a2a`), each of them attends with all
    their tokens. Those, too, are an early part of every segment and its late counterpart: what one
    rank would hold if there were as many ranks as such groups.
    """

    spans: tuple[tuple[Span, ...], ...]
    """For every rank its spans of the flat forest, ascending; neighbours are one span."""
    num_local: int
    """Tokens that every rank holds, padding included."""

    @staticmethod
    def of(forest: Forest, *, num_ranks: int, multiple: int) -> TokenLayout:
        """Deals the tokens; each rank's are padded to equal numbers, a multiple of `multiple`."""
        dealt: list[list[Span]] = [[] for _ in range(num_ranks)]
        for start, length in zip(
            forest.segment_starts.tolist(), forest.segment_lengths.tolist(), strict=True
        ):
            cuts = [start + length * i // (2 * num_ranks) for i in range(2 * num_ranks + 1)]
            for rank, spans in enumerate(dealt):
                for chunk in (rank, 2 * num_ranks - 1 - rank):
                    _append(spans, Span(cuts[chunk], cuts[chunk + 1]))
        longest = max(sum(map(len, spans)) for spans in dealt)
        return TokenLayout(
            spans=tuple(map(tuple, dealt)), num_local=-(-longest // multiple) * multiple
        )

    def tokens(self, rank: int) -> np.ndarray:
        """Flat indices of a rank's tokens, in its order, without padding."""
        ranges = [np.arange(span.start, span.stop) for span in self.spans[rank]]
        return np.concatenate([np.empty(0, dtype=np.int64), *ranges])

    def joint_spans(self, ranks: Sequence[int]) -> list[Span]:
        """The spans of several ranks together, ascending; neighbours are one span."""
        joint: list[Span] = []
        for span in sorted(
            (span for rank in ranks for span in self.spans[rank]), key=lambda span: span.start
        ):
            _append(joint, span)
        return joint

    def order(self, ranks: Sequence[int]) -> np.ndarray:
        """Where each of these ranks' tokens, ascending, stands in their tokens with padding."""
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
    """Gives a rank its tokens of a forest.

    Args:
        forest: a pack's policy or reference forest.
        device: where the tensors go.
        multiple: the number of tokens is padded to a multiple of it (sequence parallelism).
        context_rank: this rank in its context-parallel group.
        context_size: ranks of that group.
        context_inner: neighbouring ranks that scatter heads: attention sees the tokens of all of
            them, for some heads. 1 = no rank does, `context_size` = all of them do.
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
    pieces = _query_pieces(attention_runs(forest), layout.joint_spans(inner_ranks))
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


def _query_pieces(
    runs: Sequence[tuple[Span, tuple[Span, ...]]], spans: Sequence[Span]
) -> list[QueryPiece]:
    """The given spans of each run as query pieces over the keys of the flat forest."""
    pieces = []
    num_before = 0
    for span in spans:
        for run, context in runs:
            keys = Span(max(run.start, span.start), min(run.stop, span.stop))
            if keys.start >= keys.stop:
                continue
            earlier = (Span(run.start, keys.start),) if keys.start > run.start else ()
            start = num_before + keys.start - span.start
            pieces.append(
                QueryPiece(
                    queries=Span(start, start + len(keys)),
                    own_keys=keys,
                    context=(*context, *earlier),
                )
            )
        num_before += len(span)
    return pieces


def _append(spans: list[Span], span: Span) -> None:
    """Adds a span, joined with the last one where it follows directly."""
    if not len(span):
        return
    if spans and spans[-1].stop == span.start:
        spans[-1] = Span(spans[-1].start, span.stop)
    else:
        spans.append(span)


def attention_runs(forest: Forest) -> list[tuple[Span, tuple[Span, ...]]]:
    """Splits a forest into its runs, each with the spans of its ancestors, root first.

    Neighbouring ancestor spans are one, so that a branch of a tree of depth two has one ancestor
    span: the prefix.
    """
    runs: list[tuple[Span, tuple[Span, ...]]] = []
    # For every segment, the spans of its row's tokens up to and including its own.
    histories: list[tuple[Span, ...]] = []
    for start, length, parent in zip(
        forest.segment_starts.tolist(),
        forest.segment_lengths.tolist(),
        forest.segment_parents.tolist(),
        strict=True,
    ):
        own = Span(start, start + length)
        context = () if parent == NO_PARENT else histories[parent]
        if context and context[-1].stop == start:
            histories.append((*context[:-1], Span(context[-1].start, own.stop)))
            run, run_context = runs[-1]
            runs[-1] = (Span(run.start, own.stop), run_context)
        else:
            histories.append((*context, own))
            runs.append((own, context))
    return runs


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPack:
    """One microbatch as one rank holds it. Letters: N pairs, T most turns among them."""

    policy: RankTokens
    reference: RankTokens | None
    reference_terms: tuple[Term, ...]
    """The sums that the reference's edges join."""
    turn_mask: torch.Tensor
    """[N, T] bool; True where the pair has that turn."""
    counts: Mapping[Term, torch.Tensor]
    """For each of the policy's terms [N, T] int64: the tokens that its sums are over, on all ranks
    together."""
    weights: torch.Tensor
    """[N] int64; 0 for a filler's pair, else 1."""
    reference_logps: Mapping[Term, torch.Tensor] = field(default_factory=dict)
    """For each sum of the reference that was computed before [N, T] float64, nats."""


def lay_out_pack(
    pack: Pack,
    *,
    device: torch.device,
    multiple: int = 1,
    context_rank: int = 0,
    context_size: int = 1,
    context_inner: int = 1,
) -> RankPack:
    """Gives a rank its part of a microbatch; the arguments are those of `lay_out`.

    Policy and reference are dealt and padded apart, since a pipeline stage sends them side by
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


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Nothing waits for the copy: the CPU goes on, and the GPU takes its work in order."""
    return torch.from_numpy(array).to(device, non_blocking=True)
