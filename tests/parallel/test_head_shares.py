"""Heads that ranks can share out, and what is said of those that they cannot."""

from __future__ import annotations

import pytest

from megatron_longpo.errors import UserError
from megatron_longpo.parallel.head_shares import kv_repeats, largest_inner


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "repeats"),
    [(32, 8, 1, 1), (32, 8, 8, 1), (32, 8, 32, 4), (12, 2, 3, 3), (4, 4, 2, 1)],
)
def test_key_value_heads_are_repeated_until_they_divide(
    heads: int, kv_heads: int, size: int, repeats: int
) -> None:
    assert kv_repeats(heads, kv_heads, size) == repeats
    assert kv_heads * repeats % size == 0 and heads % (kv_heads * repeats) == 0


def test_a_size_that_heads_do_not_fit_is_refused_with_those_that_do() -> None:
    with pytest.raises(UserError, match=r"parallel\.context \(5\): .* use 1, 2, 3, 4, 6, 12, or"):
        kv_repeats(12, 2, 5)
    with pytest.raises(UserError, match=r"parallel\.context_inner \(8\)"):
        kv_repeats(12, 2, 8, key="parallel.context_inner")


@pytest.mark.parametrize(
    ("context", "heads", "neighbours", "inner"),
    [
        (8, [(32, 8)], 8, 8),
        (8, [(32, 8)], 4, 4),
        (16, [(32, 8), (12, 2)], 8, 4),
        (8, [(3, 1)], 8, 1),
    ],
)
def test_as_many_neighbours_scatter_heads_as_every_model_allows(
    context: int, heads: list[tuple[int, int]], neighbours: int, inner: int
) -> None:
    assert largest_inner(context, heads, neighbours=neighbours) == inner
