"""How a forest's tokens and edges are dealt to ranks."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longpo.data.rows.schema import PreferenceRow
from megatron_longpo.data.trees.forest import Forest, Term, divergence_edges
from megatron_longpo.data.trees.packing import make_pack
from megatron_longpo.data.trees.tree import TreeConfig, pair_trees
from megatron_longpo.parallel.layout import (
    RankTokens,
    TokenLayout,
    lay_out,
    lay_out_pack,
)
from tests.data.trees.forests import preference_rows
from tests.parallel.test_attention_plan import random_forests
from tests.random_rows import random_rows

quick = settings(max_examples=60, deadline=None, derandomize=True)
CPU = torch.device("cpu")
GROUPS = [(1, 1), (2, 1), (2, 2), (3, 1), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 4), (8, 8)]
"""Context-parallel ranks, and how many neighbours of them scatter heads."""


@quick
@given(random_forests, st.sampled_from(GROUPS), st.integers(1, 4))
def test_ranks_hold_every_token_and_edge_once(
    forest: Forest, ranks: tuple[int, int], multiple: int
) -> None:
    num_ranks, inner = ranks
    layout = TokenLayout.of(forest, num_ranks=num_ranks, multiple=multiple)
    here = [layout.tokens(rank) for rank in range(num_ranks)]
    assert sorted(np.concatenate(here).tolist()) == list(range(forest.num_tokens))
    assert layout.num_local % multiple == 0
    assert max(map(len, here)) <= layout.num_local < max(map(len, here)) + multiple

    edges: list[tuple[int, ...]] = []
    places: list[tuple[int, ...]] = []
    stacked: list[int] = []
    for rank in range(num_ranks):
        tokens = lay_out(
            forest,
            device=CPU,
            multiple=multiple,
            context_rank=rank,
            context_size=num_ranks,
            context_inner=inner,
        )
        assert tokens.num_tokens == layout.num_local
        count = len(here[rank])
        assert tokens.input_ids[:count].tolist() == forest.input_ids[here[rank]].tolist()
        assert tokens.position_ids[:count].tolist() == forest.position_ids[here[rank]].tolist()
        assert tokens.input_ids[count:].eq(0).all()
        stacked += [*here[rank].tolist(), *[-1] * (layout.num_local - count)]
        edges += edges_of(tokens, here[rank])
        divergence = tokens.divergence
        assert divergence.num_slots == len(divergence_edges(forest))
        places += zip(
            divergence.slots.tolist(),
            here[rank][divergence.sources.numpy()].tolist(),
            divergence.pairs.tolist(),
            strict=True,
        )
    columns = ("sources", "targets", "pairs", "turns", "terms")
    is_summed = (forest.edge_terms & ~int(Term.DIVERGENCE)) != 0
    whole = [getattr(forest, f"edge_{column}")[is_summed].tolist() for column in columns]
    assert sorted(edges) == sorted(zip(*whole, strict=True))
    compared = divergence_edges(forest)
    assert sorted(places) == [
        (slot, source, pair)
        for slot, (source, pair) in enumerate(
            zip(forest.edge_sources[compared], forest.edge_pairs[compared], strict=True)
        )
    ]
    if num_ranks > 1:
        order = tokens.attention.order
        assert order is not None
        assert [stacked[place] for place in order.all.tolist()] == list(range(forest.num_tokens))
        # The last rank's queries: all tokens of its inner group, as they lie in the flat forest.
        inner_stacked = stacked[-inner * layout.num_local :]
        queries = [inner_stacked[place] for place in order.inner.tolist()]
        assert queries == sorted(token for token in inner_stacked if token >= 0)
        last_group = range(num_ranks - inner, num_ranks)
        joint = layout.joint_spans(last_group)
        assert queries == [token for span in joint for token in range(span.start, span.stop)]
        assert all(left.stop < right.start for left, right in itertools.pairwise(joint))


def edges_of(tokens: RankTokens, here: np.ndarray) -> list[tuple[int, ...]]:
    """A rank's edges with their sources as flat indices."""
    edges = tokens.edges
    return list(
        zip(
            here[edges.sources.numpy()].tolist(),
            edges.targets.tolist(),
            edges.pairs.tolist(),
            edges.turns.tolist(),
            edges.terms.tolist(),
            strict=True,
        )
    )


def test_causal_work_is_even_in_every_long_segment() -> None:
    """A prefix and an answer, each long: no rank has more than its share and a few tokens."""
    (row,) = random_rows(np.random.default_rng(0), 9, 1, max_turns=1)
    forest = pair_trees(row, TreeConfig(nll=None)).policy
    scaled = Forest(
        **{
            name: getattr(forest, name)
            for name in Forest.__slots__
            if name not in ("segment_starts", "segment_lengths", "position_ids", "input_ids")
        },
        segment_starts=forest.segment_starts * 100,
        segment_lengths=forest.segment_lengths * 100,
        input_ids=np.zeros(forest.num_tokens * 100, dtype=np.int64),
        position_ids=np.concatenate(
            [
                np.arange(length * 100) + forest.position_ids[start] * 100
                for start, length in zip(forest.segment_starts, forest.segment_lengths, strict=True)
            ]
        ),
    )
    layout = TokenLayout.of(scaled, num_ranks=4, multiple=1)
    work = [int((scaled.position_ids[layout.tokens(rank)] + 1).sum()) for rank in range(4)]
    assert sum(work) == scaled.attended_pairs
    assert max(work) < 1.02 * sum(work) / 4
    # Where heads are scattered over neighbours, the groups' shares are as even as ranks' are.
    halves = [sum(work[:2]), sum(work[2:])]
    assert max(halves) < 1.02 * sum(work) / 2


def test_a_group_that_scatters_heads_has_two_pieces_a_segment() -> None:
    """An early part and its late counterpart, as one rank has: kernels see no smaller pieces."""
    (row,) = random_rows(np.random.default_rng(0), 200, 1, max_turns=1)
    forest = pair_trees(row, TreeConfig(nll=None)).policy
    num_segments = len(forest.segment_starts)
    for rank in range(8):
        grouped = lay_out(
            forest, device=CPU, context_rank=rank, context_size=8, context_inner=4
        ).attention
        pair = lay_out(forest, device=CPU, context_rank=rank // 4, context_size=2).attention
        assert grouped.pieces == pair.pieces
        assert len(grouped.pieces) <= 2 * num_segments


@quick
@given(st.lists(preference_rows(), min_size=1, max_size=3), st.booleans(), st.integers(1, 4))
def test_a_pack_is_laid_out_with_its_tables(
    rows: list[PreferenceRow], is_filler: bool, multiple: int
) -> None:
    pack = make_pack([pair_trees(row, TreeConfig()) for row in rows], is_filler=is_filler)
    laid_out = lay_out_pack(pack, device=CPU, multiple=multiple)
    assert laid_out.turn_mask.dtype == torch.bool
    assert laid_out.turn_mask.sum(1).tolist() == pack.turn_counts.tolist()
    assert laid_out.turn_mask.shape == (len(rows), int(pack.turn_counts.max()))
    assert laid_out.counts.keys() == pack.counts.keys()
    for term, counts in pack.counts.items():
        assert laid_out.counts[term].tolist() == counts.tolist()
    assert laid_out.reference_terms == (Term.SHORT_CHOSEN, Term.SHORT_REJECTED)
    assert laid_out.weights.tolist() == [0 if is_filler else 1] * len(rows)
    assert laid_out.reference is not None and pack.reference is not None
    for tokens, forest in ((laid_out.policy, pack.policy), (laid_out.reference, pack.reference)):
        assert tokens.num_tokens % multiple == 0
        assert tokens.num_tokens - forest.num_tokens < multiple


def test_a_pack_without_reference_has_none() -> None:
    (row,) = random_rows(np.random.default_rng(0), 9, 1)
    pack = make_pack([pair_trees(row, TreeConfig(reference=()))])
    assert lay_out_pack(pack, device=CPU).reference is None
