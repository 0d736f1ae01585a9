"""Probes: token rows that are scored, not trained on, packed and dealt like training's pairs.

Letters: R rows of a set, G the most groups of a row, S tokens of a branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_longpo.data.trees.forest import Branch, Term, build_forest
from megatron_longpo.data.trees.packing import PairSize, pair_size
from megatron_longpo.data.trees.tree import PairTrees
from megatron_longpo.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeBranch:
    """One sequence, and which of its tokens are scored."""

    input_ids: np.ndarray
    """[S] int32."""
    targets: np.ndarray
    """Positions of the scored tokens; never the first token."""
    groups: np.ndarray
    """For each target, the group whose sums it joins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeRow:
    """Sequences whose common beginning is computed once, as that of chosen and rejected is."""

    id: str
    branches: tuple[ProbeBranch, ...]


class ProbeSet:
    """Rows of one kind, with the interface that dealing and packing need."""

    def __init__(self, rows: Sequence[ProbeRow], *, compares: bool = False) -> None:
        """With `compares`, distances to the base model are scored, not log-probabilities."""
        self.rows = list(rows)
        self.compares = compares
        self.num_groups = 1 + max(
            int(branch.groups.max()) for row in self.rows for branch in row.branches
        )
        self.sizes = [pair_size(self.trees(index)) for index in range(len(self.rows))]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def largest_row_tokens(self) -> int:
        return max(size.policy_tokens for size in self.sizes)

    @cached_property
    def counts_RG(self) -> np.ndarray:
        """Counts the scored tokens, [R, G] int64."""
        counts = np.zeros((len(self.rows), self.num_groups), dtype=np.int64)
        for index, row in enumerate(self.rows):
            for branch in row.branches:
                counts[index] += np.bincount(branch.groups, minlength=self.num_groups)
        return counts

    def sizes_of(self, pairs: Sequence[int]) -> list[PairSize]:
        return [self.sizes[pair] for pair in pairs]

    def trees(self, pair: int) -> PairTrees:
        row = self.rows[pair]
        term = Term.DIVERGENCE if self.compares else Term.NLL
        branches = [_branch(branch, term) for branch in row.branches]
        forest = build_forest(branches, share=True)
        num_groups = self.num_groups
        counts = sum(np.bincount(branch.groups, minlength=num_groups) for branch in row.branches)
        return PairTrees(
            id=row.id,
            policy=forest,
            reference=forest if self.compares else None,
            reference_terms=(),
            num_turns=num_groups,
            counts={term: np.asarray(counts, dtype=np.int64)},
            unshared_tokens=sum(len(branch.input_ids) for branch in row.branches),
        )

    def check_vocabulary(self, vocab_size: int, *, what: str) -> None:
        """Raises `UserError` if a row has ids that the model does not have."""
        largest = max(int(branch.input_ids.max()) for row in self.rows for branch in row.branches)
        if largest >= vocab_size:
            raise UserError(
                f"{what}: its tokenizer gives token {largest}, outside the model's vocabulary of "
                f"{vocab_size}; give the model's own tokenizer"
            )


def _branch(branch: ProbeBranch, term: Term) -> Branch:
    length = len(branch.input_ids)
    terms = np.zeros(length, dtype=np.int64)
    terms[branch.targets] = int(term)
    turns = np.zeros(length, dtype=np.int64)
    turns[branch.targets] = branch.groups
    return Branch(input_ids=branch.input_ids.astype(np.int64), terms=terms, turns=turns)
