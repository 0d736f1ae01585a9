"""Prefix trees: the rows of a pair as a forest of token segments, and the edges the loss follows.

Rows that begin alike share those tokens: a *segment* is a run of tokens with one history, its
parent the segment that the history ends in. An *edge* is one next-token prediction that the loss
counts: (source token, target id). See design.md section 2.

Letters: T tokens of a forest, S segments, E edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Literal

import numpy as np

from megatron_longpo.data.rows import (
    IGNORED_LABEL,
    PreferenceRow,
    TokenRow,
    common_prefix_length,
)

NO_PARENT = -1


class Term(IntFlag):
    """The sums of a pair that an edge's log-probability joins; one edge may join several."""

    CHOSEN = 1
    REJECTED = 2
    NLL = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeSettings:
    """What of a row goes into its trees: decided by the objective, the reference and the user."""

    branches: tuple[Literal["chosen", "rejected"], ...] = ("chosen", "rejected")
    """Long conversations that the policy reads."""
    preference: bool = True
    """Whether the policy's answer tokens are summed as chosen and rejected."""
    nll: Literal["chosen_row", "chosen_answers", "rejected_answers"] | None = "chosen_row"
    """Tokens of the negative log-likelihood."""
    reference: Literal["short", "long"] | None = "short"
    """Rows that the reference reads."""
    share_prefix: bool = True
    """Whether rows share their common prefix; without, every row is a tree of one segment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forest:
    """Segments laid out flat, depth first, and the edges between their tokens.

    A first child follows its parent directly, so the chain of first children from a root is
    contiguous. A segment's tokens attend their ancestors and, causally, the segment itself.
    """

    input_ids: np.ndarray
    """[T] int64."""
    position_ids: np.ndarray
    """[T] int64; a token's index in its row, which RoPE turns by, never the flat offset."""
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
    """[E] int64; turn of the answer that the target belongs to, 0 where it is no answer token."""
    edge_terms: np.ndarray
    """[E] int64; `Term` flags, never 0."""

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_edges(self) -> int:
        return len(self.edge_sources)

    @property
    def attended_pairs(self) -> int:
        """Query-key pairs under the causal tree mask: token by token, its position plus one."""
        return int(self.position_ids.sum()) + self.num_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class PairTrees:
    """One pair, ready to be packed: `edge_pairs` are 0 throughout."""

    id: str
    policy: Forest
    reference: Forest | None
    num_turns: int
    nll_count: int
    """Tokens of the pair's NLL mean."""
    unshared_tokens: int
    """Policy tokens if no row shared its prefix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """A row on its way into a tree: which of its tokens are targets, for which sums.

    `terms` and `turns` are [S] int64, aligned with `input_ids`; terms 0 = not a target.
    """

    input_ids: np.ndarray
    terms: np.ndarray
    turns: np.ndarray


def pair_trees(row: PreferenceRow, settings: TreeSettings) -> PairTrees:
    """Turns a row into the trees that policy and reference read."""
    long_rows = {"chosen": row.chosen, "rejected": row.rejected}
    policy_branches = [
        _policy_branch(long_rows[name], name, settings) for name in settings.branches
    ]
    groups: list[list[Branch]] = []
    if settings.reference == "short":
        groups = [
            [
                _reference_branch(chosen, Term.CHOSEN, turn=turn),
                _reference_branch(rejected, Term.REJECTED, turn=turn),
            ]
            for turn, (chosen, rejected) in enumerate(
                zip(row.reference_chosen, row.reference_rejected, strict=True)
            )
        ]
    elif settings.reference == "long":
        groups = [
            [
                _reference_branch(row.chosen, Term.CHOSEN, turn=None),
                _reference_branch(row.rejected, Term.REJECTED, turn=None),
            ]
        ]
    share = settings.share_prefix
    reference = concatenate([build_forest(group, share=share) for group in groups])
    policy = build_forest(policy_branches, share=share)
    answers = [answer_turns(row.chosen), answer_turns(row.rejected)]
    return PairTrees(
        id=row.id,
        policy=policy,
        reference=reference if groups else None,
        num_turns=max(
            len(row.reference_chosen), *(int(turns.max(initial=-1)) + 1 for turns in answers)
        ),
        nll_count=int(np.count_nonzero(policy.edge_terms & Term.NLL)),
        unshared_tokens=sum(len(branch.input_ids) for branch in policy_branches),
    )


def answer_turns(row: TokenRow) -> np.ndarray:
    """[S] int64: index of the run of answer tokens that each token is in, -1 outside answers."""
    is_answer = row.labels != IGNORED_LABEL
    begins = is_answer & ~np.concatenate([[False], is_answer[:-1]])
    return np.where(is_answer, np.cumsum(begins) - 1, -1)


def build_forest(branches: Sequence[Branch], *, share: bool) -> Forest:
    """Lays branches out as a prefix tree; a tree of one segment each where `share` is False.

    Branches without a common first token become trees of their own. Tokens that several
    branches share appear once, and an edge that they share joins the sums of all of them.
    """
    builder = _ForestBuilder(branches)
    if share:
        builder.grow(list(range(len(branches))), start=0, parent=NO_PARENT)
    else:
        for index in range(len(branches)):
            builder.grow([index], start=0, parent=NO_PARENT)
    return builder.forest()


def concatenate(forests: Sequence[Forest], *, pairs: Sequence[int] | None = None) -> Forest:
    """Puts forests one behind the other; `pairs` gives the pair index of each one's edges."""
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


def _policy_branch(
    row: TokenRow, name: Literal["chosen", "rejected"], settings: TreeSettings
) -> Branch:
    turns = answer_turns(row)
    is_answer = turns >= 0
    terms = np.zeros(len(row), dtype=np.int64)
    if settings.preference:
        terms[is_answer] |= Term.CHOSEN if name == "chosen" else Term.REJECTED
    if settings.nll == "chosen_row" and name == "chosen":
        terms |= Term.NLL
    elif settings.nll == f"{name}_answers":
        terms[is_answer] |= Term.NLL
    return Branch(input_ids=row.input_ids, terms=terms, turns=np.maximum(turns, 0))


def _reference_branch(row: TokenRow, term: Term, *, turn: int | None) -> Branch:
    """A row for the reference; all its answers belong to `turn`, or each run to its own if None."""
    turns = answer_turns(row)
    return Branch(
        input_ids=row.input_ids,
        terms=np.where(turns >= 0, int(term), 0),
        turns=np.maximum(turns, 0) if turn is None else np.full(len(row), turn),
    )


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
        """Adds the branches of `group`, which are alike before `start`, under `parent`."""
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
        """Adds the edges whose targets are the tokens [start, end) of a segment about to come."""
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
    """End of the longest prefix that all rows have in common, knowing they agree before `start`."""
    end = min(len(row) for row in rows)
    for row in rows[1:]:
        end = start + common_prefix_length(rows[0][start:end], row[start:end])
    return end
