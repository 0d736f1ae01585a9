"""The pass over the rows before training: everything measured, everything bad refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_longpo.data.rows.dataset import open_rows
from megatron_longpo.data.rows.schema import PreferenceRow
from megatron_longpo.data.rows.writing import write_rows_jsonl
from megatron_longpo.data.trees.catalog import PairCatalog, RowLimits
from megatron_longpo.data.trees.forest import Forest
from megatron_longpo.data.trees.packing import pair_size
from megatron_longpo.data.trees.tree import TreeConfig, pair_trees
from megatron_longpo.errors import UserError
from tests.random_rows import random_row, random_rows

VOCAB = 50
LIMITS = RowLimits(vocab_size=VOCAB, max_length=1000, too_long="error", max_reference_length=None)


def make_catalog(
    folder: Path, rows: Sequence[PreferenceRow], limits: RowLimits = LIMITS, **changes: Any
) -> PairCatalog:
    write_rows_jsonl(folder / "rows.jsonl", rows)
    changes = {"tree_config": TreeConfig(), **changes}
    return PairCatalog(open_rows(str(folder / "rows.jsonl")), limits=limits, **changes)


def row(prompt_length: int = 5, id: str = "row", **shape: Any) -> PreferenceRow:
    return random_row(
        np.random.default_rng(prompt_length), VOCAB, prompt_length=prompt_length, id=id, **shape
    )


def assert_same_forest(actual: Forest | None, expected: Forest | None) -> None:
    assert (actual is None) == (expected is None)
    if actual is None or expected is None:
        return
    for name in Forest.__slots__:
        assert np.array_equal(getattr(actual, name), getattr(expected, name)), name


def refused(message: str) -> Any:
    return pytest.raises(UserError, match=message)


@pytest.mark.parametrize("share", [True, False])
def test_pairs_are_measured_and_read_again(tmp_path: Path, share: bool) -> None:
    rows = random_rows(np.random.default_rng(0), VOCAB, 5)
    tree_config = TreeConfig(share_prefix=share)
    catalog = make_catalog(tmp_path, rows, tree_config=tree_config)
    expected = [pair_trees(one, tree_config) for one in rows]
    assert len(catalog) == 5 and catalog.num_dropped == 0
    assert catalog.sizes == [pair_size(trees) for trees in expected]
    assert catalog.sizes_of([3, 1]) == [catalog.sizes[3], catalog.sizes[1]]
    assert catalog.largest_pair_tokens == max(trees.policy.num_tokens for trees in expected)
    for pair, trees in enumerate(expected):
        assert catalog.trees(pair).id == trees.id
        assert_same_forest(catalog.trees(pair).policy, trees.policy)
        assert_same_forest(catalog.trees(pair).reference, trees.reference)


def test_what_was_read_ahead_is_not_read_again(tmp_path: Path) -> None:
    rows = random_rows(np.random.default_rng(0), VOCAB, 4)
    catalog = make_catalog(tmp_path, rows)
    ahead = {pair: catalog.trees(pair) for pair in (1, 3)}
    catalog.read_ahead([3, 1])
    for pair, trees in ahead.items():
        assert catalog.trees(pair) is catalog.trees(pair)
        assert_same_forest(catalog.trees(pair).policy, trees.policy)
    catalog.read_ahead([0])
    assert catalog.trees(1) is not catalog.trees(1), "kept for one batch only"


def test_dropped_rows_leave_the_others_in_order(tmp_path: Path) -> None:
    rows = [row(5, "a"), row(30, "long"), row(6, "b"), row(31, "longer"), row(7, "c")]
    limits = replace(LIMITS, max_length=20, too_long="drop")
    catalog = make_catalog(tmp_path, rows, limits)
    assert len(catalog) == 3 and catalog.num_dropped == 2
    assert [catalog.trees(pair).id for pair in range(3)] == ["a", "b", "c"]
    assert catalog.source(2).endswith("rows.jsonl:5")


def test_rows_too_long_for_the_reference_are_dropped_too(tmp_path: Path) -> None:
    rows = [row(5, "a", chunk_lengths=(30,)), row(6, "b")]
    limits = replace(LIMITS, too_long="drop", max_reference_length=20)
    assert make_catalog(tmp_path, rows, limits).trees(0).id == "b"
    with refused(r"rows\.jsonl:1: ref_chosen_input_ids\[0\] has 33 tokens"):
        make_catalog(tmp_path, rows, replace(limits, too_long="error"))


def test_no_row_left_is_refused(tmp_path: Path) -> None:
    limits = replace(LIMITS, max_length=4, too_long="drop")
    with refused(r"rows\.jsonl: none of the 2 rows is within data\.max_length \(4\)"):
        make_catalog(tmp_path, [row(5), row(6)], limits)


@pytest.mark.parametrize("reference", [("long_chosen", "long_rejected"), ()])
def test_short_rows_are_asked_for_where_they_are_read(tmp_path: Path, reference: Any) -> None:
    bare = replace(row(6), reference_chosen=(), reference_rejected=())
    policy_too = TreeConfig(policy=("long_chosen", "short_chosen"), reference=reference)
    for tree_config in (TreeConfig(), policy_too):
        with refused(r"rows\.jsonl:2: has no short rows .*reference\.context read; use others"):
            make_catalog(tmp_path, [row(5), bare], tree_config=tree_config)
    tree_config = TreeConfig(reference=reference)
    catalog = make_catalog(tmp_path, [row(5), bare], tree_config=tree_config)
    assert len(catalog) == 2
    assert catalog.trees(1).num_turns == 1
    assert_same_forest(catalog.trees(1).policy, pair_trees(row(6), tree_config).policy)
    assert_same_forest(catalog.trees(1).reference, pair_trees(row(6), tree_config).reference)


def test_the_first_bad_row_is_named(tmp_path: Path) -> None:
    rows = [row(5), random_row(np.random.default_rng(1), 200, prompt_length=60), row(6)]
    with refused(r"rows\.jsonl:2: chosen_input_ids\[\d+\] is \d+, outside .* vocabulary of 50"):
        make_catalog(tmp_path, rows)


def test_a_pair_past_the_budget_is_named(tmp_path: Path) -> None:
    catalog = make_catalog(tmp_path, [row(5, "small"), row(30, "book-17"), row(40, "larger")])
    catalog.check_budget(47)
    # 30 of the prompt, answers of 3 and 4.
    with refused(
        r"data\.pack_tokens \(36\): pair 'book-17' \(.*rows\.jsonl:2\) has 37 .* least 47"
    ):
        catalog.check_budget(36)


def with_answers_run_together(of: PreferenceRow) -> PreferenceRow:
    """The question between the rejected answers is labelled too."""
    labels = of.rejected.labels.copy()
    labels[5:] = of.rejected.input_ids[5:]
    return replace(of, rejected=replace(of.rejected, labels=labels))


def with_references_twice(of: PreferenceRow) -> PreferenceRow:
    return replace(
        of,
        reference_chosen=of.reference_chosen * 2,
        reference_rejected=of.reference_rejected * 2,
    )


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (with_answers_run_together, "chosen 2, rejected 1, reference 2"),
        (with_references_twice, "chosen 2, rejected 2, reference 4"),
    ],
)
def test_every_turn_needs_its_answers_and_short_rows(
    tmp_path: Path, damage: Callable[[PreferenceRow], PreferenceRow], found: str
) -> None:
    two_turns: dict[str, Any] = {"chosen_answer_lengths": (1, 2), "rejected_answer_lengths": (3, 3)}
    rows = [row(6, **two_turns), damage(row(5, **two_turns))]
    for per_turn in (False, True):
        with refused(rf"rows\.jsonl:2: answers of the row: {found}; the short reference rows"):
            make_catalog(tmp_path, rows, per_turn=per_turn)


def test_without_short_rows_only_turns_mind_unequal_answers(tmp_path: Path) -> None:
    two_turns: dict[str, Any] = {"chosen_answer_lengths": (1, 2), "rejected_answer_lengths": (3, 3)}
    rows = [with_answers_run_together(row(5, **two_turns))]
    tree_config = TreeConfig(reference=("long_chosen", "long_rejected"))
    assert len(make_catalog(tmp_path, rows, tree_config=tree_config)) == 1
    with refused(r"rows\.jsonl:1: answers of the row: chosen 2, rejected 1; per_turn pairs"):
        make_catalog(tmp_path, rows, tree_config=tree_config, per_turn=True)


def test_progress_sees_every_row(tmp_path: Path) -> None:
    seen: list[int] = []

    def progress(indices: Iterable[int]) -> Iterable[int]:
        for index in indices:
            seen.append(index)
            yield index

    make_catalog(tmp_path, [row(5), row(6), row(7)], progress=progress)
    assert seen == [0, 1, 2]
