"""Features work together: the covering array covers, a slice of it runs, the page has all of it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.parity.combinations import (
    FEATURES,
    FREE,
    Combination,
    allowed_pairs,
    covering_array,
    is_allowed,
    pairs_of,
)
from tests.parity.harness import Shelf
from tests.parity.table import PAGE, cells_of, run_combinations


def test_free_features_have_no_say() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        one = Combination(**{name: rng.choice(values) for name, values in FEATURES.items()})
        for name in FREE:
            other = replace(one, **{name: rng.choice(FEATURES[name])})
            assert (is_allowed(other), other.num_ranks) == (is_allowed(one), one.num_ranks)


def test_every_two_values_meet() -> None:
    array = covering_array()
    assert len(array) >= 40 and len(set(array)) == len(array)
    assert all(is_allowed(one) for one in array)
    met = {pair for one in array for pair in pairs_of(one)}
    assert met == allowed_pairs()
    # Nothing of a feature is left out, and what cannot meet is what the settings refuse.
    assert {value for pair in met for value in pair} == {
        (name, value) for name, values in FEATURES.items() for value in values
    }
    for impossible in (
        {("sequence", "on"), ("tensor", "1")},
        {("reference", "cached"), ("objective", "opsdl")},
        {("adapters", "lora"), ("reference", "offload")},
    ):
        assert not any(set(pair) == impossible for pair in met)
    for wanted in (
        {("virtual", "2"), ("context", "a2a+all_gather")},
        {("adapters", "lora"), ("reference", "cached")},
        {("objective", "opsdl"), ("recompute", "full")},
    ):
        assert any(set(pair) == wanted for pair in met)


@pytest.mark.parametrize(("num_ranks", "parts"), [(1, 2), (2, 3), (4, 4)])
def test_a_slice_is_the_oracles(num_ranks: int, parts: int, shelf: Shelf) -> None:
    results = run_combinations(num_ranks, shelf, parts=parts, timeout_s=240)
    assert results
    for result in results:
        assert result.holds, f"{result.combination}: {result.found}"


def test_the_page_has_every_combination() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    _, *documented = [row[:9] for row in rows if len(row) == 12]
    assert sorted(documented) == sorted(cells_of(one) for one in covering_array())
