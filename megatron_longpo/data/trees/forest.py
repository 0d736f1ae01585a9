"""Forests of token segments, and the edges between their tokens that a loss follows.

Rows share the tokens of a common beginning. A *segment* is a run of tokens with one history; its
parent is the segment in which that history ends. An *edge* is one next-token prediction that the
loss counts: (source token, target id). See design.md section 2.

Letters: T tokens of a forest, S segments, E edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag

import numpy as np

from megatron_longpo.config.names import RowName
from megatron_longpo.data.common_prefix import common_prefix_length

NO_PARENT = -1


class Term(IntFlag):
    """The sums of a pair that an edge joins; one edge may join several.

    The first four are the answer tokens of a row. `DIVERGENCE` compares next-token distributions of
    policy and reference; the others sum log-probabilities.
    """

    LONG_CHOSEN = 1
    LONG_REJECTED = 2
    SHORT_CHOSEN = 4
    SHORT_REJECTED = 8
    NLL = 16
    DIVERGENCE = 32

    @staticmethod
    def of_row(row: RowName) -> Term:
        return Term[row.upper()]


@dataclass(frozen=True, kw_only=True, slots=True)
class Forest:
    """Segments in one flat sequence, depth first, and the edges between their tokens.

    A first child directly follows its parent, so the chain of first children from a root is
    contiguous. A segment's tokens attend to their ancestors and, causally, to the segment itself.
    """

    input_ids: np.ndarray
    """[T] int64."""
    position_ids: np.ndarray
    """[T] int64; a token's index in its row, which RoPE uses, not the flat offset."""
    segment_starts: np.ndarray
    """[S] int64; flat index of a segment's first token; ascending, without gaps."""
    segment_lengths: np.ndarray
    """[S] int64; at least 1."""
    segment_parents: np.ndarray
    """[S] int64; a smaller segment index, or `NO_PARENT` for a root."""
    edge_sources: np.ndarray
    """[E] int64; flat index of the token that predicts; ascending."""
    edge_targets: np.ndarray
    """[E] int64; the token id that is predicted."""
    edge_pairs: np.ndarray
    """[E] int64; pair index in the pack."""
    edge_turns: np.ndarray
    """[E] int64; turn of the answer that the target belongs to, 0 for other tokens."""
    edge_terms: np.ndarray
    """[E] int64; `Term` flags, never 0."""

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_edges(self) -> int:
        return len(self.edge_sources)

    @property
    def num_scored(self) -> int:
        """Next-token distributions that the head computes; an edge's divergence is one more."""
        diverges = (self.edge_terms & Term.DIVERGENCE) != 0
        return int(diverges.sum()) + int(((self.edge_terms & ~Term.DIVERGENCE) != 0).sum())

    @property
    def attended_pairs(self) -> int:
        """Query-key pairs under the causal tree mask: token by token, its position plus one."""
        return int(self.position_ids.sum()) + self.num_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """The tokens of a row before it joins a tree, and which of them are targets of which sums.

    `terms` and `turns` are [S] int64, aligned with `input_ids`; terms 0 = not a target.
    """

    input_ids: np.ndarray
    terms: np.ndarray
    turns: np.ndarray


def build_forest(branches: Sequence[Branch], *, share: bool) -> Forest:
    """Builds prefix trees from branches; without `share`, every branch is a tree of one segment.

    Branches without a common first token become separate trees. Tokens that several branches share
    appear once, and an edge that they share joins the sums of all of them.
    """
    builder = _ForestBuilder(branches)
    if share:
        builder.grow(list(range(len(branches))), start=0, parent=NO_PARENT)
    else:
        for index in range(len(branches)):
            builder.grow([index], start=0, parent=NO_PARENT)
    return builder.forest()


def concatenate(forests: Sequence[Forest], *, pairs: Sequence[int] | None = None) -> Forest:
    """Concatenates forests; `pairs` gives the pair index of each forest's edges."""
    token_offsets = np.cumsum([0] + [forest.num_tokens for forest in forests])
    segment_offsets = np.cumsum([0] + [len(forest.segment_starts) for forest in forests])

    def joined(field: str, offsets: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        parts = [getattr(forest, field) for forest in forests]
        if offsets is not None:
            parts = [part + offset for part, offset in zip(parts, offsets, strict=False)]
        return np.concatenate([np.empty(0, dtype=np.int64), *parts])

    parents = [
        np.where(forest.segment_parents == NO_PARENT, NO_PARENT, forest.segment_parents + offset)
        for forest, offset in zip(forests, segment_offsets, strict=False)
    ]
    return Forest(
        input_ids=joined("input_ids"),
        position_ids=joined("position_ids"),
        segment_starts=joined("segment_starts", token_offsets),
        segment_lengths=joined("segment_lengths"),
        segment_parents=np.concatenate([np.empty(0, dtype=np.int64), *parents]),
        edge_sources=joined("edge_sources", token_offsets),
        edge_targets=joined("edge_targets"),
        edge_pairs=joined("edge_pairs", pairs),
        edge_turns=joined("edge_turns"),
        edge_terms=joined("edge_terms"),
    )


def divergence_edges(forest: Forest) -> np.ndarray:
    """Returns [D] int64: indices of the divergence's edges, by pair, turn and position.

    So edge n of the policy's forest and edge n of the reference's predict the same token.
    """
    edges = np.flatnonzero(forest.edge_terms & Term.DIVERGENCE)
    positions = forest.position_ids[forest.edge_sources[edges]]
    return edges[np.lexsort((positions, forest.edge_turns[edges], forest.edge_pairs[edges]))]


class _ForestBuilder:
    """Collects segments and edges while the tree is walked depth first."""

    def __init__(self, branches: Sequence[Branch]) -> None:
        self.branches = branches
        self.num_tokens = 0
        self.input_ids: list[np.ndarray] = []
        self.position_ids: list[np.ndarray] = []
        self.starts: list[int] = []
        self.parents: list[int] = []
        # source, target, turn, terms: [4, n] blocks
        self.edges: list[np.ndarray] = [np.empty((4, 0), dtype=np.int64)]

    def grow(self, group: list[int], *, start: int, parent: int) -> None:
        """Adds the branches of `group`, which are equal before `start`, under `parent`."""
        end = _common_end([self.branches[index].input_ids for index in group], start)
        if end > start:
            self._add_edges(group, start, end, parent)
            parent = self._add_segment(self.branches[group[0]].input_ids[start:end], start, parent)
        by_next_token: dict[int, list[int]] = {}
        for index in group:
            ids = self.branches[index].input_ids
            if len(ids) > end:
                by_next_token.setdefault(int(ids[end]), []).append(index)
        for subgroup in by_next_token.values():
            self.grow(subgroup, start=end, parent=parent)

    def _add_segment(self, input_ids: np.ndarray, start: int, parent: int) -> int:
        self.input_ids.append(input_ids)
        self.position_ids.append(np.arange(start, start + len(input_ids)))
        self.starts.append(self.num_tokens)
        self.parents.append(parent)
        self.num_tokens += len(input_ids)
        return len(self.starts) - 1

    def _add_edges(self, group: list[int], start: int, end: int, parent: int) -> None:
        """Adds the edges whose targets are the tokens [start, end) of the next segment."""
        sources = np.arange(end - start) + self.num_tokens - 1
        if parent == NO_PARENT:
            # Nothing predicts the first token of a row.
            first = 1
        else:
            sources[0] = self.starts[parent] + len(self.input_ids[parent]) - 1
            first = 0
        span = slice(start + first, end)
        terms = [self.branches[index].terms[span].copy() for index in group]
        turns = [self.branches[index].turns[span] for index in group]
        targets = self.branches[group[0]].input_ids[span]
        for one in range(len(group)):
            for other in range(one + 1, len(group)):
                # The same prediction for the same turn is one edge that joins both rows' sums.
                same = (terms[one] > 0) & (terms[other] > 0) & (turns[one] == turns[other])
                terms[one][same] |= terms[other][same]
                terms[other][same] = 0
            kept = terms[one] > 0
            self.edges.append(
                np.stack([sources[first:][kept], targets[kept], turns[one][kept], terms[one][kept]])
            )

    def forest(self) -> Forest:
        edges = np.concatenate(self.edges, axis=1)
        edges = edges[:, np.argsort(edges[0], kind="stable")]
        empty = np.empty(0, dtype=np.int64)
        return Forest(
            input_ids=np.concatenate([empty, *self.input_ids]),
            position_ids=np.concatenate([empty, *self.position_ids]),
            segment_starts=np.array(self.starts, dtype=np.int64),
            segment_lengths=np.array([len(ids) for ids in self.input_ids], dtype=np.int64),
            segment_parents=np.array(self.parents, dtype=np.int64),
            edge_sources=edges[0],
            edge_targets=edges[1],
            edge_pairs=np.zeros(edges.shape[1], dtype=np.int64),
            edge_turns=edges[2],
            edge_terms=edges[3],
        )


def _common_end(rows: Sequence[np.ndarray], start: int) -> int:
    """Returns the end of the longest common prefix of rows that are equal before `start`."""
    end = min(len(row) for row in rows)
    for row in rows[1:]:
        end = start + common_prefix_length(rows[0][start:end], row[start:end])
    return end
