"""Builds a pair's prefix trees: one forest for the policy and one for the reference."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_longpo.config.names import ROW_NAMES, NllTokens, RowName
from megatron_longpo.data.rows.schema import IGNORED_LABEL, PreferenceRow, TokenRow
from megatron_longpo.data.trees.forest import (
    Branch,
    Forest,
    Term,
    build_forest,
    concatenate,
    divergence_edges,
)
from megatron_longpo.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeConfig:
    """Which parts of a pair go into its trees, as objective, reference and user decide."""

    policy: tuple[RowName, ...] = ("long_chosen", "long_rejected")
    """Rows whose answers the policy's log-probabilities are summed over."""
    reference: tuple[RowName, ...] = ("short_chosen", "short_rejected")
    """The same for the reference; empty = no sums of the reference."""
    packs_reference: bool = True
    """Whether the reference's rows are packed; False if its sums were computed before."""
    nll: NllTokens | None = "chosen_row"
    """Tokens of the policy's negative log-likelihood."""
    divergence: tuple[RowName, RowName] | None = None
    """Two rows with the same answer, along which policy and reference are compared token by token:
    the policy reads the first row, the reference the second."""
    share_prefix: bool = True
    """Whether rows share their common prefix; if not, every row is a tree of one segment."""

    @property
    def policy_rows(self) -> tuple[RowName, ...]:
        """All rows that the policy reads."""
        student = () if self.divergence is None else self.divergence[:1]
        return _in_order({*self.policy, *student, *_NLL_ROWS[self.nll]})

    @property
    def reference_rows(self) -> tuple[RowName, ...]:
        """All rows that the reference reads."""
        teacher = () if self.divergence is None else self.divergence[1:]
        return _in_order({*self.reference, *teacher})

    @property
    def policy_terms(self) -> tuple[Term, ...]:
        """The sums that the policy's edges join."""
        terms = [Term.of_row(row) for row in self.policy]
        if self.nll is not None:
            terms.append(Term.NLL)
        if self.divergence is not None:
            terms.append(Term.DIVERGENCE)
        return tuple(terms)

    @property
    def reads_short_rows(self) -> bool:
        return any(row.startswith("short") for row in (*self.policy_rows, *self.reference_rows))


_NLL_ROWS: dict[NllTokens | None, tuple[RowName, ...]] = {
    None: (),
    "chosen_row": ("long_chosen",),
    "chosen_answers": ("long_chosen",),
    "rejected_answers": ("long_rejected",),
    "short_chosen_answers": ("short_chosen",),
}


def _in_order(rows: Collection[RowName]) -> tuple[RowName, ...]:
    return tuple(row for row in ROW_NAMES if row in rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairTrees:
    """One pair, ready to be packed; all its `edge_pairs` are 0."""

    id: str
    policy: Forest
    reference: Forest | None
    reference_terms: tuple[Term, ...]
    """The sums that the reference's edges join."""
    num_turns: int
    counts: Mapping[Term, np.ndarray]
    """[num_turns] int64 for each of the policy's terms: the number of tokens in its sums."""
    unshared_tokens: int
    """Policy tokens if no row shared its prefix."""
    reference_logps: Mapping[Term, np.ndarray] = field(default_factory=dict)
    """[num_turns] float64 in nats for each sum of the reference that was computed before."""


def pair_trees(row: PreferenceRow, config: TreeConfig) -> PairTrees:
    """Turns a row into the trees that policy and reference read.

    Raises:
        UserError: if the answers of the divergence's two rows differ.
    """
    policy_terms = {name: Term.of_row(name) for name in config.policy}
    reference_terms = {name: Term.of_row(name) for name in config.reference}
    if config.divergence is not None:
        student, teacher = config.divergence
        policy_terms[student] = policy_terms.get(student, Term(0)) | Term.DIVERGENCE
        reference_terms[teacher] = reference_terms.get(teacher, Term(0)) | Term.DIVERGENCE
    groups = _groups(row, config.policy_rows, policy_terms, nll=config.nll)
    policy = _forest(groups, share=config.share_prefix)
    reference = None
    if config.reference_rows and config.packs_reference:
        reference_groups = _groups(row, config.reference_rows, reference_terms, nll=None)
        reference = _forest(reference_groups, share=config.share_prefix)
    if config.divergence is not None:
        assert reference is not None
        _check_aligned(row, policy, reference)
    answers = [answer_turns(row.chosen), answer_turns(row.rejected)]
    num_turns = max(
        len(row.reference_chosen), *(int(turns.max(initial=-1)) + 1 for turns in answers)
    )
    summed = () if reference is None else config.reference
    return PairTrees(
        id=row.id,
        policy=policy,
        reference=reference,
        reference_terms=tuple(Term.of_row(name) for name in summed),
        num_turns=num_turns,
        counts={term: _count(policy, term, num_turns) for term in config.policy_terms},
        unshared_tokens=sum(len(branch.input_ids) for group in groups for branch in group),
    )


def reference_alone(trees: PairTrees) -> PairTrees:
    """Puts the reference's trees in the policy's place, to score rows before training."""
    forest = trees.reference
    assert forest is not None, "the reference reads nothing"
    return replace(
        trees,
        policy=forest,
        reference=None,
        reference_terms=(),
        counts={term: _count(forest, term, trees.num_turns) for term in trees.reference_terms},
    )


def _check_aligned(row: PreferenceRow, policy: Forest, reference: Forest) -> None:
    """Raises `UserError` if the answers are not the same tokens for policy and reference."""
    ours, theirs = (
        np.stack([forest.edge_turns[edges], forest.edge_targets[edges]])
        for forest, edges in ((f, divergence_edges(f)) for f in (policy, reference))
    )
    if not np.array_equal(ours, theirs):
        raise UserError(
            f"{row.source}: its long and short rows answer with other tokens "
            f"({ours.shape[1]} and {theirs.shape[1]} of them), which a divergence compares one by "
            "one; make the rows with longpo tokenize, or use another objective.name"
        )


def _count(forest: Forest, term: Term, num_turns: int) -> np.ndarray:
    joins = (forest.edge_terms & term) != 0
    return np.bincount(forest.edge_turns[joins], minlength=num_turns)


def answer_turns(row: TokenRow) -> np.ndarray:
    """Returns [S] int64: the index of each token's run of answer tokens, -1 outside answers."""
    is_answer = row.labels != IGNORED_LABEL
    begins = is_answer & ~np.concatenate([[False], is_answer[:-1]])
    return np.where(is_answer, np.cumsum(begins) - 1, -1)


def _forest(groups: Sequence[Sequence[Branch]], *, share: bool) -> Forest:
    return concatenate([build_forest(group, share=share) for group in groups])


def _groups(
    row: PreferenceRow,
    names: Sequence[RowName],
    terms: Mapping[RowName, Term],
    *,
    nll: NllTokens | None,
) -> list[list[Branch]]:
    """Returns the rows `names` as branches, in groups that may share a prefix.

    The long conversations are one group, then the short rows of each turn.
    """
    long_rows: dict[RowName, TokenRow] = {"long_chosen": row.chosen, "long_rejected": row.rejected}
    short_rows: dict[RowName, tuple[TokenRow, ...]] = {
        "short_chosen": row.reference_chosen,
        "short_rejected": row.reference_rejected,
    }

    def branch(name: RowName, tokens: TokenRow, turn: int | None) -> Branch:
        return _branch(
            tokens,
            answer_terms=terms.get(name, Term(0)),
            nll=nll if name in _NLL_ROWS[nll] else None,
            turn=turn,
        )

    groups = [[branch(name, long_rows[name], None) for name in names if name in long_rows]]
    short_names = [name for name in names if name in short_rows]
    for turn in range(len(row.reference_chosen) if short_names else 0):
        groups.append([branch(name, short_rows[name][turn], turn) for name in short_names])
    return [group for group in groups if group]


def _branch(
    tokens: TokenRow, *, answer_terms: Term, nll: NllTokens | None, turn: int | None
) -> Branch:
    """Returns a row as a branch. Its answers belong to `turn`; None = each run to its own turn."""
    turns = answer_turns(tokens)
    is_answer = turns >= 0
    terms = np.where(is_answer, int(answer_terms), 0)
    if nll == "chosen_row":
        terms |= Term.NLL
    elif nll is not None:
        terms[is_answer] |= Term.NLL
    return Branch(
        input_ids=tokens.input_ids,
        terms=terms,
        turns=np.maximum(turns, 0) if turn is None else np.full(len(tokens), turn),
    )
