"""Runs of a forest cover it, and know what each of their tokens attends.

That attention over them is a dense mask's is in tests/model/attention/test_tree_attention.py.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longpo.data.trees.forest import Forest, build_forest
from megatron_longpo.parallel.attention_plan import Span, attention_runs
from tests.data.trees.forests import branches

quick = settings(max_examples=60, deadline=None, derandomize=True)

random_forests = st.builds(
    lambda rows, share: build_forest(rows, share=share),
    st.lists(branches(), min_size=1, max_size=5),
    st.booleans(),
)


def test_runs_follow_first_children() -> None:
    """`0 -> 1 -> 2`, then 3 below 1 and 4 below 0: one run of three segments and two branches."""
    forest = Forest(
        input_ids=np.arange(11),
        position_ids=np.arange(11),
        segment_starts=np.array([0, 3, 5, 6, 8]),
        segment_lengths=np.array([3, 2, 1, 2, 3]),
        segment_parents=np.array([-1, 0, 1, 1, 0]),
        edge_sources=np.empty(0, dtype=np.int64),
        edge_targets=np.empty(0, dtype=np.int64),
        edge_pairs=np.empty(0, dtype=np.int64),
        edge_turns=np.empty(0, dtype=np.int64),
        edge_terms=np.empty(0, dtype=np.int64),
    )
    assert attention_runs(forest) == [
        (Span(0, 6), ()),
        # Its ancestors are neighbours and so one span.
        (Span(6, 8), (Span(0, 5),)),
        (Span(8, 11), (Span(0, 3),)),
    ]


@quick
@given(random_forests)
def test_runs_cover_the_forest_and_know_each_tokens_row(forest: Forest) -> None:
    runs = attention_runs(forest)
    assert [run.start for run, _ in runs] == [0, *(run.stop for run, _ in runs)][:-1]
    assert runs[-1][0].stop == forest.num_tokens
    for run, context in runs:
        before = [token for span in context for token in range(span.start, span.stop)]
        row = [*before, *range(run.start, run.stop)]
        assert forest.position_ids[row].tolist() == list(range(len(row)))
        assert all(left.stop < right.start for left, right in itertools.pairwise(context))


@pytest.mark.parametrize(("start", "stop", "length"), [(2, 5, 3), (4, 4, 0)])
def test_spans_have_a_length(start: int, stop: int, length: int) -> None:
    assert len(Span(start, stop)) == length
