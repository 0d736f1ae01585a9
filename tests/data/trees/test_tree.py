"""Trees keep every token, position and prediction of their rows, shared or not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longpo.config.names import NllTokens, RowName
from megatron_longpo.data.rows.schema import PreferenceRow, TokenRow
from megatron_longpo.data.trees.forest import (
    NO_PARENT,
    Branch,
    Forest,
    Term,
    build_forest,
    concatenate,
    divergence_edges,
)
from megatron_longpo.data.trees.tree import TreeConfig, answer_turns, pair_trees
from megatron_longpo.errors import UserError
from tests.data.trees.forests import (
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

LONG: tuple[RowName, RowName] = ("long_chosen", "long_rejected")
SHORT: tuple[RowName, RowName] = ("short_chosen", "short_rejected")
NLL: tuple[NllTokens | None, ...] = (
    "chosen_row",
    "chosen_answers",
    None,
    "rejected_answers",
    "short_chosen_answers",
)
TREE_SETTINGS = [
    TreeConfig(nll=nll, reference=reference) for nll in NLL[:3] for reference in (SHORT, LONG)
] + [
    TreeConfig(policy=(), nll="chosen_row", reference=()),
    TreeConfig(policy=(), nll="rejected_answers", reference=()),
    TreeConfig(policy=(*SHORT, "long_chosen"), nll=None, reference=(*SHORT, "long_chosen")),
    TreeConfig(policy=(*SHORT, "long_chosen"), nll="short_chosen_answers", reference=()),
    TreeConfig(policy=(), nll=None, reference=(), divergence=("long_rejected", "short_rejected")),
    TreeConfig(reference=SHORT, divergence=("long_chosen", "long_chosen")),
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


def expected_groups(row: PreferenceRow, of: TreeConfig, *, policy: bool) -> list[list[Branch]]:
    """Groups of rows that may share tokens, from the sums that are wanted of them."""
    scored = of.policy if policy else of.reference
    compared = None if of.divergence is None else of.divergence[0 if policy else 1]
    nll_row, nll_scope = {
        None: (None, None),
        "chosen_row": ("long_chosen", "row"),
        "chosen_answers": ("long_chosen", "answers"),
        "rejected_answers": ("long_rejected", "answers"),
        "short_chosen_answers": ("short_chosen", "answers"),
    }[of.nll if policy else None]

    def branch(name: RowName, tokens: TokenRow, turn: int | None) -> list[Branch]:
        term = Term[name.upper()] if name in scored else Term(0)
        if name == compared:
            term |= Term.DIVERGENCE
        if not term and name != nll_row:
            return []
        return [expected_branch(tokens, term, nll_scope if name == nll_row else None, turn)]

    groups = [branch("long_chosen", row.chosen, None) + branch("long_rejected", row.rejected, None)]
    for turn, (chosen, rejected) in enumerate(
        zip(row.reference_chosen, row.reference_rejected, strict=True)
    ):
        groups.append(
            branch("short_chosen", chosen, turn) + branch("short_rejected", rejected, turn)
        )
    return [group for group in groups if group]


def expected_rows(row: PreferenceRow, of: TreeConfig, *, policy: bool) -> list[Branch]:
    return [branch for group in expected_groups(row, of, policy=policy) for branch in group]


@quick
@given(preference_rows(), st.sampled_from(TREE_SETTINGS), st.booleans())
def test_every_prediction_of_the_rows_is_in_the_trees(
    row: PreferenceRow, of: TreeConfig, share: bool
) -> None:
    """The same multiset of (turn, term, history, target), read from the rows, shared or not."""
    trees = pair_trees(row, replace(of, share_prefix=share))
    assert forest_predictions(trees.policy) == branch_predictions(
        expected_rows(row, of, policy=True)
    )
    check_layout(trees.policy)
    assert (trees.reference is None) == (not of.reference_rows)
    if trees.reference is not None:
        wanted = expected_rows(row, of, policy=False)
        assert forest_predictions(trees.reference) == branch_predictions(wanted)
        check_layout(trees.reference)


@quick
@given(preference_rows(), st.sampled_from(TREE_SETTINGS))
def test_tokens_are_kept_once_where_shared_and_twice_where_not(
    row: PreferenceRow, of: TreeConfig
) -> None:
    wanted = [ids_of(branch) for branch in expected_rows(row, of, policy=True)]
    shared = pair_trees(row, replace(of, share_prefix=True))
    apart = pair_trees(row, replace(of, share_prefix=False))
    groups = [
        [ids_of(branch) for branch in group] for group in expected_groups(row, of, policy=True)
    ]
    assert shared.policy.num_tokens == sum(num_prefixes(group) for group in groups)
    assert set(wanted) <= set(token_histories(shared.policy))
    assert [ids_of_segment(apart.policy, index) for index in range(len(wanted))] == wanted
    assert list(apart.policy.segment_parents) == [NO_PARENT] * len(wanted)
    assert shared.unshared_tokens == apart.unshared_tokens == apart.policy.num_tokens
    if shared.reference is not None:
        groups = [
            [ids_of(branch) for branch in group] for group in expected_groups(row, of, policy=False)
        ]
        assert shared.reference.num_tokens == sum(num_prefixes(group) for group in groups)


def ids_of_segment(forest: Forest, segment: int) -> tuple[int, ...]:
    start, length = forest.segment_starts[segment], forest.segment_lengths[segment]
    return tuple(int(token) for token in forest.input_ids[start : start + length])


@quick
@given(preference_rows(), st.sampled_from(TREE_SETTINGS), st.booleans())
def test_counts_of_a_pair(row: PreferenceRow, of: TreeConfig, share: bool) -> None:
    trees = pair_trees(row, replace(of, share_prefix=share))
    predictions = branch_predictions(expected_rows(row, of, policy=True))
    wanted = {term: [0] * trees.num_turns for term in of.policy_terms}
    for (_, turn, term, _, _), count in predictions.items():
        wanted[Term(term)][turn] += count
    assert {term: counts.tolist() for term, counts in trees.counts.items()} == wanted
    assert trees.reference_terms == tuple(Term[name.upper()] for name in of.reference)
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
    trees = pair_trees(row, TreeConfig())
    policy, reference = trees.policy, trees.reference
    assert policy.input_ids.tolist() == [7, 8, 9, 1, 2, 3]
    assert policy.position_ids.tolist() == [0, 1, 2, 3, 4, 3]
    assert policy.segment_starts.tolist() == [0, 3, 5]
    assert policy.segment_parents.tolist() == [NO_PARENT, 0, 0]
    assert policy.edge_sources.tolist() == [0, 1, 2, 2, 3]
    assert policy.edge_targets.tolist() == [8, 9, 1, 3, 2]
    nll, answer = int(Term.NLL), int(Term.LONG_CHOSEN | Term.NLL)
    assert policy.edge_terms.tolist() == [nll, nll, answer, int(Term.LONG_REJECTED), answer]
    assert (trees.num_turns, trees.unshared_tokens) == (1, 9)
    assert {term: list(counts) for term, counts in trees.counts.items()} == {
        Term.LONG_CHOSEN: [2],
        Term.LONG_REJECTED: [1],
        Term.NLL: [4],
    }
    # Under the causal tree mask: 1 + 2 + 3, then 4 + 5 for C and 4 for R.
    assert policy.attended_pairs == 19
    assert reference is not None
    assert reference.input_ids.tolist() == [9, 1, 2, 3]
    assert reference.position_ids.tolist() == [0, 1, 2, 1]
    assert reference.edge_sources.tolist() == [0, 0, 1]
    assert reference.edge_targets.tolist() == [1, 3, 2]


def test_an_answer_beginning_alike_is_predicted_once_for_both_sums() -> None:
    row = random_row(np.random.default_rng(0), 9, prompt_length=4, common_prefix_length=6)
    edges = pair_trees(row, TreeConfig(nll=None)).policy
    both = edges.edge_terms == int(Term.LONG_CHOSEN | Term.LONG_REJECTED)
    assert edges.edge_sources[both].tolist() == [3, 4]
    # Answers of 3 and 4 tokens, two of them shared.
    assert edges.num_edges == 3 + 4 - 2


@quick
@given(preference_rows(), st.booleans(), st.sampled_from(["chosen", "rejected"]))
def test_a_divergence_meets_the_same_answer_in_both_trees(
    row: PreferenceRow, share: bool, branch: str
) -> None:
    """Place by place the same turn and target, though the rows before them differ."""
    rows: Any = (f"long_{branch}", f"short_{branch}")
    of = TreeConfig(divergence=rows, nll=None, share_prefix=share)
    pair = concatenate_pairs([row, row], of)
    places = [
        np.stack([getattr(forest, f"edge_{name}") for name in ("pairs", "turns", "targets")])[
            :, divergence_edges(forest)
        ]
        for forest in pair
    ]
    assert np.array_equal(*places)
    answers: TokenRow = getattr(row, branch)
    answer = [int(label) for label in answers.labels if label != -100]
    assert places[0][2].tolist() == answer * 2
    assert places[0][0].tolist() == [0] * len(answer) + [1] * len(answer)


def concatenate_pairs(rows: list[PreferenceRow], of: TreeConfig) -> tuple[Forest, Forest]:
    trees = [pair_trees(row, of) for row in rows]
    policy = concatenate([one.policy for one in trees], pairs=range(len(rows)))
    references = [one.reference for one in trees if one.reference is not None]
    return policy, concatenate(references, pairs=range(len(rows)))


def test_a_divergence_along_other_answers_is_refused() -> None:
    row = random_row(np.random.default_rng(0), 9)
    other = random_row(np.random.default_rng(1), 9, chosen_answer_lengths=(2,))
    mixed = replace(row, reference_chosen=other.reference_chosen)
    settings = TreeConfig(divergence=("long_chosen", "short_chosen"))
    with pytest.raises(UserError, match=r"random:row: .*\(3 and 2 of them\)"):
        pair_trees(mixed, settings)
    pair_trees(mixed, replace(settings, divergence=("long_rejected", "short_rejected")))


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
