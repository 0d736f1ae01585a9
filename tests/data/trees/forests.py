"""Random rows and branches for hypothesis, and forests read back the slow way: token by token."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from hypothesis import strategies as st

from megatron_longpo.data.rows.schema import PreferenceRow
from megatron_longpo.data.trees.forest import NO_PARENT, Branch, Forest, Term
from tests.random_rows import random_row

Prediction = tuple[int, int, int, tuple[int, ...], int]
"""(pair, turn, one term, history, target)."""


@st.composite
def preference_rows(draw: st.DrawFn) -> PreferenceRow:
    """Pairs of 1 to 3 turns that share from nothing up to the whole of the shorter row.

    The vocabulary is tiny, so that rows also agree by accident where they should not share.
    """
    num_turns = draw(st.integers(1, 3))
    lengths = st.lists(st.integers(1, 4), min_size=num_turns, max_size=num_turns)
    chosen, rejected, chunks = draw(lengths), draw(lengths), draw(lengths)
    prompt, question, trailing = (
        draw(st.integers(1, 6)),
        draw(st.integers(1, 2)),
        draw(st.integers(0, 2)),
    )
    around = prompt + question * (num_turns - 1) + trailing
    return random_row(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        draw(st.integers(2, 4)),
        common_prefix_length=draw(st.integers(0, around + min(sum(chosen), sum(rejected)))),
        prompt_length=prompt,
        chosen_answer_lengths=chosen,
        rejected_answer_lengths=rejected,
        chunk_lengths=chunks,
        question_length=question,
        trailing_length=trailing,
        id=f"pair{draw(st.integers(0, 99))}",
    )


@st.composite
def branches(draw: st.DrawFn) -> Branch:
    """A row over two tokens with arbitrary terms and turns: several of them make deep trees."""
    length = draw(st.integers(1, 6))

    def column(low: int, high: int) -> np.ndarray:
        values = draw(st.lists(st.integers(low, high), min_size=length, max_size=length))
        return np.array(values, dtype=np.int64)

    return Branch(input_ids=column(0, 1), terms=column(0, 63), turns=column(0, 1))


def token_histories(forest: Forest) -> list[tuple[int, ...]]:
    """For each token its row up to and including itself, by walking to the root."""
    histories: list[tuple[int, ...]] = []
    for start, length, parent in zip(
        forest.segment_starts, forest.segment_lengths, forest.segment_parents, strict=True
    ):
        history: tuple[int, ...] = ()
        if parent != NO_PARENT:
            parent_end = forest.segment_starts[parent] + forest.segment_lengths[parent]
            history = histories[parent_end - 1]
        for token in forest.input_ids[start : start + length]:
            history = (*history, int(token))
            histories.append(history)
    return histories


def forest_predictions(forest: Forest) -> Counter[Prediction]:
    """What the edges say, one entry for each sum that an edge joins."""
    histories = token_histories(forest)
    found: Counter[Prediction] = Counter()
    for source, target, pair, turn, terms in zip(
        forest.edge_sources,
        forest.edge_targets,
        forest.edge_pairs,
        forest.edge_turns,
        forest.edge_terms,
        strict=True,
    ):
        for term in Term:
            if terms & term:
                found[int(pair), int(turn), int(term), histories[source], int(target)] += 1
    return found


def branch_predictions(rows: list[Branch], *, pair: int = 0) -> Counter[Prediction]:
    """What the edges should say. One prediction that two rows put into one sum counts twice.

    Only rows with a term in common can do that; the long rows of a pair have none.
    """
    expected: Counter[Prediction] = Counter()
    for row in rows:
        ids = tuple(int(token) for token in row.input_ids)
        for at in range(1, len(ids)):
            for term in Term:
                if row.terms[at] & term:
                    expected[pair, int(row.turns[at]), int(term), ids[:at], ids[at]] += 1
    return expected


def check_layout(forest: Forest) -> None:
    """What every forest promises about its tables, whatever is in it."""
    starts, lengths, parents = (
        forest.segment_starts,
        forest.segment_lengths,
        forest.segment_parents,
    )
    assert np.array_equal(starts, np.cumsum([0, *lengths])[:-1]), "ascending, without gaps"
    assert (lengths >= 1).all() and int(lengths.sum()) == forest.num_tokens
    assert [len(history) - 1 for history in token_histories(forest)] == list(forest.position_ids)

    open_chain: list[int] = []
    for segment, parent in enumerate(parents):
        # Depth first: a parent is on the chain from the segment before up to its root. So a
        # first child can stand nowhere but right behind its parent.
        assert parent == NO_PARENT or parent in open_chain
        while open_chain and open_chain[-1] != parent:
            open_chain.pop()
        open_chain.append(segment)

    assert (np.diff(forest.edge_sources) >= 0).all() and (forest.edge_terms > 0).all()
    fields: list[Any] = ["sources", "targets", "pairs", "turns", "terms"]
    for field in fields:
        column = getattr(forest, f"edge_{field}")
        assert column.dtype == np.int64 and column.shape == (forest.num_edges,)
