"""Packs the pairs of a microbatch into flat forests, and deals a global batch to the ranks."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_longpo.data.trees.forest import Forest, Term, concatenate
from megatron_longpo.data.trees.tree import PairTrees
from megatron_longpo.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """One microbatch. Letters: N pairs of the pack, T the most turns of a pair."""

    policy: Forest
    reference: Forest | None
    reference_terms: tuple[Term, ...]
    """The sums that the reference's edges join."""
    pair_ids: tuple[str, ...]
    weights: np.ndarray
    """[N] int64; 1, or 0 for the pair of a filler microbatch, which no sum or count includes."""
    turn_counts: np.ndarray
    """[N] int64."""
    counts: Mapping[Term, np.ndarray]
    """[N, T] int64 for each of the policy's terms: the number of tokens in its sums."""
    reference_logps: Mapping[Term, np.ndarray]
    """[N, T] float64 in nats for each sum of the reference that was computed before; 0 in turns
    that a pair lacks."""

    @property
    def num_pairs(self) -> int:
        return len(self.pair_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSize:
    """The sizes of a pair, for dealing, packing and the step's metrics."""

    policy_tokens: int
    """Physical tokens: shared ones count once."""
    unshared_tokens: int
    """Policy tokens if no row shared its prefix."""
    reference_tokens: int
    policy_attended: int
    """Query-key pairs under the causal tree mask."""
    reference_attended: int
    policy_edges: int
    """Next-token distributions that the head computes."""
    reference_edges: int

    @property
    def reference_alone(self) -> PairSize:
        """The size of the pair after `tree.reference_alone`."""
        return PairSize(
            policy_tokens=self.reference_tokens,
            unshared_tokens=self.reference_tokens,
            reference_tokens=0,
            policy_attended=self.reference_attended,
            reference_attended=0,
            policy_edges=self.reference_edges,
            reference_edges=0,
        )

    @property
    def attention_cost(self) -> int:
        """Backward costs as much as two forward passes, and the reference has no backward."""
        return 3 * self.policy_attended + self.reference_attended


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """Indices into the global batch. A filler makes ranks' counts equal; its weight is 0."""

    pairs: tuple[int, ...]
    is_filler: bool = False


def pair_size(trees: PairTrees) -> PairSize:
    """Measures a pair's trees."""
    policy, reference = trees.policy, trees.reference
    return PairSize(
        policy_tokens=policy.num_tokens,
        unshared_tokens=trees.unshared_tokens,
        reference_tokens=reference.num_tokens if reference is not None else 0,
        policy_attended=policy.attended_pairs,
        reference_attended=reference.attended_pairs if reference is not None else 0,
        policy_edges=policy.num_scored,
        reference_edges=reference.num_scored if reference is not None else 0,
    )


def make_pack(pairs: Sequence[PairTrees], *, is_filler: bool = False) -> Pack:
    """Concatenates the pairs of a microbatch; pair n of the pack is `pairs[n]`."""
    references = [trees.reference for trees in pairs if trees.reference is not None]
    order = range(len(pairs))
    num_turns = max(trees.num_turns for trees in pairs)
    return Pack(
        policy=concatenate([trees.policy for trees in pairs], pairs=order),
        reference=concatenate(references, pairs=order) if references else None,
        reference_terms=pairs[0].reference_terms,
        pair_ids=tuple(trees.id for trees in pairs),
        weights=np.full(len(pairs), 0 if is_filler else 1, dtype=np.int64),
        turn_counts=np.array([trees.num_turns for trees in pairs], dtype=np.int64),
        counts=_stacked([trees.counts for trees in pairs], num_turns),
        reference_logps=_stacked([trees.reference_logps for trees in pairs], num_turns),
    )


def _stacked(
    by_term: Sequence[Mapping[Term, np.ndarray]], num_turns: int
) -> dict[Term, np.ndarray]:
    """Stacks the pairs' values, one for each turn, to [N, num_turns], padded with 0."""
    return {
        term: np.stack([np.pad(of[term], (0, num_turns - len(of[term]))) for of in by_term])
        for term in by_term[0]
    }


def deal(
    sizes: Sequence[PairSize], *, num_ranks: int, budget_tokens: int, multiple: int = 1
) -> list[list[Microbatch]]:
    """Deals a global batch to the data-parallel ranks and packs each rank's share.

    Every rank computes the same result. The pair that costs most is dealt first, to the rank with
    the least attention so far. A rank's pairs are packed first-fit, longest first. A pipeline
    schedule needs equal counts, so ranks with fewer microbatches split some of theirs, and get
    fillers if none can be split.

    Args:
        sizes: the pairs of the global batch.
        num_ranks: data-parallel size.
        budget_tokens: the most physical policy tokens of a microbatch.
        multiple: every rank's number of microbatches is a multiple of it.

    Returns:
        The microbatches of every rank, in equal numbers of at least one.

    Raises:
        UserError: if a single pair exceeds the budget.
    """
    for index, size in enumerate(sizes):
        if size.policy_tokens > budget_tokens:
            raise UserError(
                f"data.pack_tokens ({budget_tokens}): pair {index} of the batch has "
                f"{size.policy_tokens} policy tokens; raise data.pack_tokens or leave it null"
            )
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i].attention_cost, i)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (load + sizes[index].attention_cost, rank))
    dealt = [_pack_first_fit(share, sizes, budget_tokens) for share in shares]
    most = max(len(microbatches) for microbatches in dealt)
    most = -(-most // multiple) * multiple
    dealt = [_split_up(microbatches, sizes, most) for microbatches in dealt]
    cheapest = min(range(len(sizes)), key=lambda i: (sizes[i].attention_cost, i))
    filler = Microbatch(pairs=(cheapest,), is_filler=True)
    return [microbatches + [filler] * (most - len(microbatches)) for microbatches in dealt]


def _pack_first_fit(
    share: Sequence[int], sizes: Sequence[PairSize], budget_tokens: int
) -> list[Microbatch]:
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(share, key=lambda i: (-sizes[i].policy_tokens, i)):
        need = sizes[index].policy_tokens
        for position, free in enumerate(room):
            if need <= free:
                bins[position].append(index)
                room[position] -= need
                break
        else:
            bins.append([index])
            room.append(budget_tokens - need)
    return [Microbatch(pairs=tuple(members)) for members in bins]


def _split_up(
    microbatches: Sequence[Microbatch], sizes: Sequence[PairSize], most: int
) -> list[Microbatch]:
    """Halves the fullest microbatches until there are `most`, or none has several pairs."""

    def tokens(microbatch: Microbatch) -> int:
        return sum(sizes[index].policy_tokens for index in microbatch.pairs)

    split = list(microbatches)
    while len(split) < most:
        position = max(
            (i for i, microbatch in enumerate(split) if len(microbatch.pairs) > 1),
            key=lambda i: (tokens(split[i]), -i),
            default=None,
        )
        if position is None:
            break
        pairs = split[position].pairs
        # Pairs are sorted by length: taking every second one makes halves of similar size.
        split[position : position + 1] = [
            Microbatch(pairs=pairs[::2]),
            Microbatch(pairs=pairs[1::2]),
        ]
    return split
