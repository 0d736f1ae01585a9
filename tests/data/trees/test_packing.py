"""Packs hold each pair once and within the budget, and dealing is even."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longpo.data.rows.schema import PreferenceRow
from megatron_longpo.data.trees.packing import Microbatch, PairSize, deal, make_pack, pair_size
from megatron_longpo.data.trees.tree import TreeConfig, pair_trees
from megatron_longpo.errors import UserError
from tests.data.trees.forests import (
    Prediction,
    check_layout,
    forest_predictions,
    preference_rows,
    token_histories,
)
from tests.random_rows import random_rows

quick = settings(max_examples=80, deadline=None, derandomize=True)

BUDGET = 20


def size_of(policy_tokens: int, cost: int, reference_tokens: int = 0) -> PairSize:
    """A pair of which dealing sees just these; the cost is put on the reference, at weight 1."""
    return PairSize(
        policy_tokens=policy_tokens,
        unshared_tokens=2 * policy_tokens,
        reference_tokens=reference_tokens,
        policy_attended=0,
        reference_attended=cost,
        policy_edges=1,
        reference_edges=1,
    )


sizes = st.lists(
    st.builds(size_of, st.integers(1, BUDGET), st.integers(1, 400), st.integers(0, 30)),
    min_size=1,
    max_size=14,
)
tree_settings = st.builds(
    TreeConfig,
    nll=st.sampled_from(["chosen_row", "chosen_answers", None]),
    reference=st.sampled_from([("short_chosen", "short_rejected"), ("long_chosen",), ()]),
    share_prefix=st.booleans(),
)


@quick
@given(sizes, st.integers(1, 5))
def test_each_pair_is_dealt_once_within_the_budget(batch: list[PairSize], num_ranks: int) -> None:
    ranks = deal(batch, num_ranks=num_ranks, budget_tokens=BUDGET)
    assert len(ranks) == num_ranks
    real = [m for microbatches in ranks for m in microbatches if not m.is_filler]
    assert sorted(index for m in real for index in m.pairs) == list(range(len(batch)))
    for microbatch in real:
        assert microbatch.pairs
        assert sum(batch[index].policy_tokens for index in microbatch.pairs) <= BUDGET


@quick
@given(sizes, st.integers(1, 5))
def test_ranks_run_equally_many_microbatches(batch: list[PairSize], num_ranks: int) -> None:
    ranks = deal(batch, num_ranks=num_ranks, budget_tokens=BUDGET)
    count = len(ranks[0])
    assert count >= 1
    cheapest = min(size.attention_cost for size in batch)
    for microbatches in ranks:
        assert len(microbatches) == count
        fillers = [m for m in microbatches if m.is_filler]
        # Fillers are real pairs, the cheapest there are, and come last.
        assert microbatches[count - len(fillers) :] == fillers
        assert all([batch[i].attention_cost for i in m.pairs] == [cheapest] for m in fillers)
    assert any(not m.is_filler for microbatches in ranks for m in microbatches[count - 1 :])


@quick
@given(sizes, st.integers(1, 3), st.integers(1, 4))
def test_counts_are_a_multiple_and_fillers_the_last_resort(
    batch: list[PairSize], num_ranks: int, multiple: int
) -> None:
    ranks = deal(batch, num_ranks=num_ranks, budget_tokens=BUDGET, multiple=multiple)
    usual = deal(batch, num_ranks=num_ranks, budget_tokens=BUDGET)
    assert len(ranks[0]) == -(-len(usual[0]) // multiple) * multiple
    for microbatches, before in zip(ranks, usual, strict=True):
        # A rank has the same pairs as ever.
        real = [m for m in microbatches if not m.is_filler]
        pairs = sorted(i for m in before if not m.is_filler for i in m.pairs)
        assert sorted(i for m in real for i in m.pairs) == pairs
        # While it has a filler, none of its microbatches could be split.
        assert len(real) == len(microbatches) or all(len(m.pairs) == 1 for m in real)


def test_a_microbatch_is_halved_rather_than_filled_up() -> None:
    """Four pairs fit into one pack, and a pipeline of two wants two."""
    batch = [size_of(tokens, tokens) for tokens in (5, 2, 4, 3)]
    (microbatches,) = deal(batch, num_ranks=1, budget_tokens=14, multiple=2)
    assert microbatches == [Microbatch(pairs=(0, 3)), Microbatch(pairs=(2, 1))]


@quick
@given(sizes, st.integers(1, 5))
def test_attention_is_balanced_and_packs_are_not_wasted(
    batch: list[PairSize], num_ranks: int
) -> None:
    ranks = deal(batch, num_ranks=num_ranks, budget_tokens=BUDGET)
    loads, dearest = [], max(size.attention_cost for size in batch)
    for microbatches in ranks:
        real = [m for m in microbatches if not m.is_filler]
        loads.append(sum(batch[i].attention_cost for m in real for i in m.pairs))
        tokens = sorted(sum(batch[i].policy_tokens for i in m.pairs) for m in real)
        # First fit: no two packs of a rank would have fitted into one, unless it made them itself
        # to have as many as another.
        assert num_ranks > 1 or len(tokens) < 2 or tokens[0] + tokens[1] > BUDGET
    # The last pair a rank got went to the least loaded one.
    assert max(loads) - min(loads) <= dearest


def test_the_dearest_pairs_are_dealt_first() -> None:
    """Costs 2 1 1 to two ranks: 2 | 1, then 1 to the second: 2 | 2. In row order it is 3 | 1."""
    batch = [size_of(5, cost) for cost in (1, 1, 2)]
    ranks = deal(batch, num_ranks=2, budget_tokens=10)
    dealt = [sorted(i for m in microbatches for i in m.pairs) for microbatches in ranks]
    assert sorted(dealt) == [[0, 1], [2]]


def test_ranks_without_a_pair_get_a_filler() -> None:
    ranks = deal([size_of(5, 1)], num_ranks=3, budget_tokens=5)
    filler = [Microbatch(pairs=(0,), is_filler=True)]
    assert sorted(ranks, key=lambda m: m[0].is_filler) == [[Microbatch(pairs=(0,))], filler, filler]


def test_a_pair_past_the_budget_is_refused_in_one_line() -> None:
    batch = [size_of(5, 1), size_of(21, 1)]
    with pytest.raises(UserError, match=r"data\.pack_tokens \(20\): pair .* 21 policy tokens") as e:
        deal(batch, num_ranks=1, budget_tokens=20)
    assert "\n" not in str(e.value)


def test_reference_tokens_ride_on_top_of_the_budget() -> None:
    batch = [size_of(10, 1, reference_tokens=99), size_of(10, 1, reference_tokens=99)]
    (microbatches,) = deal(batch, num_ranks=1, budget_tokens=20)
    assert microbatches == [Microbatch(pairs=(0, 1))]


@quick
@given(st.lists(preference_rows(), min_size=1, max_size=3), tree_settings, st.booleans())
def test_a_pack_is_its_pairs_side_by_side(
    rows: list[PreferenceRow], of: TreeConfig, is_filler: bool
) -> None:
    pairs = [pair_trees(row, of) for row in rows]
    pack = make_pack(pairs, is_filler=is_filler)
    assert pack.num_pairs == len(rows) and pack.pair_ids == tuple(row.id for row in rows)
    assert pack.turn_counts.tolist() == [trees.num_turns for trees in pairs]
    for term, counts in pack.counts.items():
        for trees, row_counts in zip(pairs, counts.tolist(), strict=True):
            absent = [0] * (len(row_counts) - trees.num_turns)
            assert row_counts == [*trees.counts[term].tolist(), *absent]
    for name in ("policy", "reference"):
        forests = [getattr(trees, name) for trees in pairs]
        whole = getattr(pack, name)
        if not of.reference and name == "reference":
            assert whole is None
            continue
        check_layout(whole)
        assert token_histories(whole) == [one for f in forests for one in token_histories(f)]
        expected: Counter[Prediction] = Counter()
        for index, forest in enumerate(forests):
            for (_, turn, term, history, target), n in forest_predictions(forest).items():
                expected[index, turn, term, history, target] = n
        assert forest_predictions(whole) == expected

    assert pack.weights.tolist() == [0 if is_filler else 1] * len(rows)


def test_pair_size_measures_both_forests() -> None:
    (row,) = random_rows(np.random.default_rng(0), 9, 1, max_turns=1)
    long = [len(row.chosen), len(row.rejected)]
    short = [len(one) for one in (*row.reference_chosen, *row.reference_rejected)]
    answers = [int((one.labels != -100).sum()) for one in (row.chosen, row.rejected)]

    def causal(lengths: list[int]) -> int:
        return sum(length * (length + 1) // 2 for length in lengths)

    of = TreeConfig(share_prefix=False, nll="chosen_row")
    size = pair_size(pair_trees(row, of))
    assert size == PairSize(
        policy_tokens=sum(long),
        unshared_tokens=sum(long),
        reference_tokens=sum(short),
        policy_attended=causal(long),
        reference_attended=causal(short),
        # Every chosen token but the first, and the rejected answer.
        policy_edges=long[0] - 1 + answers[1],
        reference_edges=sum(answers),
    )
    assert size.attention_cost == 3 * causal(long) + causal(short)
    alone = pair_size(pair_trees(row, TreeConfig(reference=())))
    assert (alone.reference_tokens, alone.reference_attended, alone.reference_edges) == (0, 0, 0)
    assert alone.policy_tokens < alone.unshared_tokens == sum(long)
