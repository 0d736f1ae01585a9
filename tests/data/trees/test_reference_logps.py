"""Sums that were computed before: found by row, refused where the row is another."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_longpo.config.names import RowName
from megatron_longpo.data.trees.forest import Term
from megatron_longpo.data.trees.packing import make_pack, pair_size
from megatron_longpo.data.trees.reference_logps import ReferenceLogps, joined
from megatron_longpo.data.trees.tree import TreeConfig, pair_trees, reference_alone
from megatron_longpo.errors import UserError
from tests.random_rows import random_row

ROWS: tuple[RowName, ...] = ("short_chosen", "short_rejected")


def logps(rows: dict[int, list[float]], *, ids: str = "row") -> ReferenceLogps:
    """`rows` are the chosen sums of each row's turns; the rejected ones are ten times those."""
    turns = np.array([value for values in rows.values() for value in values])
    return ReferenceLogps(
        indices=np.array(list(rows)),
        ids=np.array([f"{ids}{index}" for index in rows]),
        num_turns=np.array([len(values) for values in rows.values()]),
        sums={"short_chosen": turns, "short_rejected": 10 * turns},
        source="cache/abc",
    )


def of(
    table: ReferenceLogps, index: int, *, row_id: str, num_turns: int
) -> dict[Term, list[float]]:
    sums = table.of(index, row_id=row_id, num_turns=num_turns, where=f"rows[{index}]", rows=ROWS)
    return {term: values.tolist() for term, values in sums.items()}


def test_parts_in_any_order_are_one_table_in_the_order_of_rows() -> None:
    late, early = logps({5: [-5.0], 7: [-7.0, -7.5]}), logps({2: [-2.0, -2.5, -2.75], 4: [-4.0]})
    table = joined([late, early], source="both")
    assert table.indices.tolist() == [2, 4, 5, 7]
    assert table.ids.tolist() == ["row2", "row4", "row5", "row7"]
    assert table.num_turns.tolist() == [3, 1, 1, 2]
    assert table.sums["short_chosen"].tolist() == [-2.0, -2.5, -2.75, -4.0, -5.0, -7.0, -7.5]
    assert of(table, 7, row_id="row7", num_turns=2) == {
        Term.SHORT_CHOSEN: [-7.0, -7.5],
        Term.SHORT_REJECTED: [-70.0, -75.0],
    }
    assert of(table, 4, row_id="row4", num_turns=1)[Term.SHORT_CHOSEN] == [-4.0]


def test_of_a_row_in_two_parts_one_is_kept() -> None:
    table = joined([logps({1: [-1.0, -1.5]}), logps({0: [0.0], 1: [-9.0, -9.0]})], source="x")
    assert table.indices.tolist() == [0, 1]
    assert table.sums["short_chosen"].tolist() == [0.0, -1.0, -1.5]


@pytest.mark.parametrize(
    ("index", "row_id", "num_turns", "said"),
    [
        (3, "row3", 1, r"rows\[3\]: is not among the 2 rows in cache/abc; run longpo reference"),
        (9, "row9", 1, "is not among the 2 rows"),
        (1, "other", 2, r"has the id 'other' and 2 turns, in cache/abc it has 'row1' and 2"),
        (1, "row1", 1, r"has the id 'row1' and 1 turns, in cache/abc it has 'row1' and 2"),
    ],
)
def test_a_row_that_is_missing_or_another_is_refused(
    index: int, row_id: str, num_turns: int, said: str
) -> None:
    table = logps({1: [-1.0, -2.0], 4: [-4.0]})
    with pytest.raises(UserError, match=said):
        of(table, index, row_id=row_id, num_turns=num_turns)


def test_the_reference_alone_is_what_it_is_beside_the_policy() -> None:
    row = random_row(
        np.random.default_rng(0),
        50,
        chosen_answer_lengths=(3, 5),
        rejected_answer_lengths=(4, 2),
    )
    beside = pair_trees(row, TreeConfig())
    alone = reference_alone(beside)
    assert alone.policy is beside.reference
    assert alone.reference is None and alone.reference_terms == ()
    assert alone.num_turns == 2
    counts = {term: values.tolist() for term, values in alone.counts.items()}
    assert counts == {Term.SHORT_CHOSEN: [3, 5], Term.SHORT_REJECTED: [4, 2]}
    size, measured = pair_size(beside).reference_alone, pair_size(alone)
    for field in ("policy_tokens", "policy_attended", "policy_edges", "attention_cost"):
        assert getattr(size, field) == getattr(measured, field), field


def test_without_its_trees_the_reference_leaves_nothing_to_pack() -> None:
    row = random_row(np.random.default_rng(0), 50)
    tree_config = TreeConfig(packs_reference=False)
    assert tree_config.reads_short_rows
    trees = pair_trees(row, tree_config)
    assert trees.reference is None and trees.reference_terms == ()
    assert pair_size(trees).reference_tokens == 0
    assert make_pack([trees]).reference is None
