"""Trees keep every token, position and prediction of their rows, shared or not."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longpo.data.rows import PreferenceRow, TokenRow
from megatron_longpo.data.tree import (
    NO_PARENT,
    Branch,
    Forest,
    Term,
    TreeSettings,
    answer_turns,
    build_forest,
    concatenate,
    pair_trees,
)
from tests.data.forests import (
    Prediction,
    branch_predictions,
    branches,
    check_layout,
    forest_predictions,
    preference_rows,
    token_histories,
)
from tests.random_rows import random_row

quick = settings(max_examples=80, deadline=None, derandomize=True)

LongName = Literal["chosen", "rejected"]
TREE_SETTINGS = [
    TreeSettings(nll=nll, reference=reference)
    for nll in ("chosen_row", "chosen_answers", None)
    for reference in ("short", "long")
] + [
    TreeSettings(branches=("chosen",), preference=False, nll="chosen_row", reference=None),
    TreeSettings(branches=("rejected",), preference=False, nll="rejected_answers", reference=None),
]


def ids_of(row: TokenRow | Branch) -> tuple[int, ...]:
    return tuple(int(token) for token in row.input_ids)


def num_prefixes(rows: list[tuple[int, ...]]) -> int:
    """Nodes of the rows' prefix tree: the fewest tokens that can hold them."""
    return len({row[:end] for row in rows for end in range(1, len(row) + 1)})


def expected_branch(row: TokenRow, term: Term, nll: str | None, turn: int | None) -> Branch:
    """A row's predictions, label by label: an unbroken run of labels is a turn's answer."""
    terms, turns, current = [], [], -1
    for at, label in enumerate(row.labels):
        is_answer = label != -100
        if is_answer and (at == 0 or row.labels[at - 1] == -100):
            current += 1
        terms.append(
            (term if is_answer else 0)
            | (Term.NLL if nll == "row" or (nll == "answers" and is_answer) else 0)
        )
        turns.append((current if turn is None else turn) if is_answer else 0)
    return Branch(input_ids=row.input_ids, terms=np.array(terms), turns=np.array(turns))


def expected_policy(row: PreferenceRow, of: TreeSettings) -> list[Branch]:
    found = []
    for name, term in (("chosen", Term.CHOSEN), ("rejected", Term.REJECTED)):
        if name in of.branches:
            scope = None
            if of.nll is not None and of.nll.startswith(name):
                scope = "row" if of.nll == "chosen_row" else "answers"
            long_row = getattr(row, name)
            found.append(expected_branch(long_row, term if of.preference else Term(0), scope, None))
    return found


def expected_reference(row: PreferenceRow, of: TreeSettings) -> list[list[Branch]]:
    """Groups of rows that may share tokens."""
    if of.reference == "long":
        return [
            [
                expected_branch(row.chosen, Term.CHOSEN, None, None),
                expected_branch(row.rejected, Term.REJECTED, None, None),
            ]
        ]
    return [
        [
            expected_branch(row.reference_chosen[turn], Term.CHOSEN, None, turn),
            expected_branch(row.reference_rejected[turn], Term.REJECTED, None, turn),
        ]
        for turn in range(len(row.reference_chosen))
    ]


def with_sharing(of: TreeSettings, share_prefix: bool) -> TreeSettings:
    return TreeSettings(
        branches=of.branches,
        preference=of.preference,
        nll=of.nll,
        reference=of.reference,
        share_prefix=share_prefix,
    )


@quick
@given(preference_rows(), st.sampled_from(TREE_SETTINGS), st.booleans())
def test_every_prediction_of_the_rows_is_in_the_trees(
    row: PreferenceRow, of: TreeSettings, share: bool
) -> None:
    """The same multiset of (turn, term, history, target), read from the rows, shared or not."""
    trees = pair_trees(row, with_sharing(of, share))
    assert forest_predictions(trees.policy) == branch_predictions(expected_policy(row, of))
    check_layout(trees.policy)
    assert (trees.reference is None) == (of.reference is None)
    if trees.reference is not None:
        wanted = [branch for group in expected_reference(row, of) for branch in group]
        assert forest_predictions(trees.reference) == branch_predictions(wanted)
        check_layout(trees.reference)


@quick
@given(preference_rows(), st.sampled_from(TREE_SETTINGS))
def test_tokens_are_kept_once_where_shared_and_twice_where_not(
    row: PreferenceRow, of: TreeSettings
) -> None:
    wanted = [ids_of(branch) for branch in expected_policy(row, of)]
    shared = pair_trees(row, with_sharing(of, True))
    apart = pair_trees(row, with_sharing(of, False))
    assert shared.policy.num_tokens == num_prefixes(wanted)
    assert set(wanted) <= set(token_histories(shared.policy))
    assert [ids_of_segment(apart.policy, index) for index in range(len(wanted))] == wanted
    assert list(apart.policy.segment_parents) == [NO_PARENT] * len(wanted)
    assert shared.unshared_tokens == apart.unshared_tokens == apart.policy.num_tokens
    if shared.reference is not None:
        groups = [[ids_of(branch) for branch in group] for group in expected_reference(row, of)]
        assert shared.reference.num_tokens == sum(num_prefixes(group) for group in groups)


def ids_of_segment(forest: Forest, segment: int) -> tuple[int, ...]:
    start, length = forest.segment_starts[segment], forest.segment_lengths[segment]
    return tuple(int(token) for token in forest.input_ids[start : start + length])


@quick
@given(preference_rows(), st.sampled_from(TREE_SETTINGS), st.booleans())
def test_counts_of_a_pair(row: PreferenceRow, of: TreeSettings, share: bool) -> None:
    trees = pair_trees(row, with_sharing(of, share))
    counts = {
        None: 0,
        "chosen_row": len(row.chosen) - 1,
        "chosen_answers": int((row.chosen.labels[1:] != -100).sum()),
        "rejected_answers": int((row.rejected.labels[1:] != -100).sum()),
    }
    assert trees.nll_count == counts[of.nll]
    assert trees.num_turns == len(row.reference_chosen)
    assert trees.id == row.id
    assert not trees.policy.edge_pairs.any()


@quick
@given(st.lists(branches(), min_size=1, max_size=5))
def test_a_forest_of_any_depth_holds_its_branches(rows: list[Branch]) -> None:
    forest = build_forest(rows, share=True)
    check_layout(forest)
    histories = token_histories(forest)
    assert len(histories) == len(set(histories)) == num_prefixes([ids_of(row) for row in rows])
    assert {ids_of(row) for row in rows} <= set(histories)
    # Which sums a prediction joins, for each turn; two rows that join the same sum are one entry.
    assert set(forest_predictions(forest)) == set(branch_predictions(rows))
    children: dict[int, list[int]] = {}
    for segment, parent in enumerate(forest.segment_parents):
        children.setdefault(int(parent), []).append(segment)
    for siblings in children.values():
        first_tokens = [int(forest.input_ids[forest.segment_starts[one]]) for one in siblings]
        assert len(set(first_tokens)) == len(first_tokens), "what can be shared is shared"


@quick
@given(st.lists(branches(), min_size=1, max_size=4), st.booleans())
def test_attended_pairs_are_those_of_the_tree_mask(rows: list[Branch], share: bool) -> None:
    forest = build_forest(rows, share=share)
    assert forest.attended_pairs == sum(len(history) for history in token_histories(forest))


@quick
@given(st.lists(st.lists(branches(), min_size=1, max_size=3), max_size=4), st.data())
def test_concatenation_keeps_forests_apart(groups: list[list[Branch]], data: Any) -> None:
    forests = [build_forest(group, share=True) for group in groups]
    pairs = [data.draw(st.integers(0, 5)) for _ in groups]
    whole = concatenate(forests, pairs=pairs)
    check_layout(whole)
    assert token_histories(whole) == [one for f in forests for one in token_histories(f)]
    expected: dict[Prediction, int] = {}
    for forest, pair in zip(forests, pairs, strict=True):
        for (_, *rest), count in forest_predictions(forest).items():
            key: Any = (pair, *rest)
            expected[key] = expected.get(key, 0) + count
    assert dict(forest_predictions(whole)) == expected


def test_the_last_shared_token_predicts_two_answers() -> None:
    """P = 7 8 9, C = 1 2, R = 3: the tables written out by hand."""
    row = PreferenceRow(
        id="a",
        source="a",
        chosen=TokenRow(input_ids=np.array([7, 8, 9, 1, 2]), labels=np.array([-100] * 3 + [1, 2])),
        rejected=TokenRow(input_ids=np.array([7, 8, 9, 3]), labels=np.array([-100] * 3 + [3])),
        reference_chosen=(TokenRow(input_ids=np.array([9, 1, 2]), labels=np.array([-100, 1, 2])),),
        reference_rejected=(TokenRow(input_ids=np.array([9, 3]), labels=np.array([-100, 3])),),
    )
    trees = pair_trees(row, TreeSettings())
    policy, reference = trees.policy, trees.reference
    assert policy.input_ids.tolist() == [7, 8, 9, 1, 2, 3]
    assert policy.position_ids.tolist() == [0, 1, 2, 3, 4, 3]
    assert policy.segment_starts.tolist() == [0, 3, 5]
    assert policy.segment_parents.tolist() == [NO_PARENT, 0, 0]
    assert policy.edge_sources.tolist() == [0, 1, 2, 2, 3]
    assert policy.edge_targets.tolist() == [8, 9, 1, 3, 2]
    nll, answer = int(Term.NLL), int(Term.CHOSEN | Term.NLL)
    assert policy.edge_terms.tolist() == [nll, nll, answer, int(Term.REJECTED), answer]
    assert (trees.num_turns, trees.nll_count, trees.unshared_tokens) == (1, 4, 9)
    # Under the causal tree mask: 1 + 2 + 3, then 4 + 5 for C and 4 for R.
    assert policy.attended_pairs == 19
    assert reference is not None
    assert reference.input_ids.tolist() == [9, 1, 2, 3]
    assert reference.position_ids.tolist() == [0, 1, 2, 1]
    assert reference.edge_sources.tolist() == [0, 0, 1]
    assert reference.edge_targets.tolist() == [1, 3, 2]


def test_an_answer_beginning_alike_is_predicted_once_for_both_sums() -> None:
    row = random_row(np.random.default_rng(0), 9, prompt_length=4, common_prefix_length=6)
    edges = pair_trees(row, TreeSettings(nll=None)).policy
    both = edges.edge_terms == int(Term.CHOSEN | Term.REJECTED)
    assert edges.edge_sources[both].tolist() == [3, 4]
    # Answers of 3 and 4 tokens, two of them shared.
    assert edges.num_edges == 3 + 4 - 2


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([-100, -100], [-1, -1]),
        ([-100, 5, 5, -100, 5], [-1, 0, 0, -1, 1]),
        ([5, -100, 5], [0, -1, 1]),
    ],
)
def test_turns_are_runs_of_labels(labels: list[int], expected: list[int]) -> None:
    row = TokenRow(input_ids=np.full(len(labels), 5), labels=np.array(labels))
    assert answer_turns(row).tolist() == expected
