"""How many ranks can share attention heads: arithmetic of `a2a`."""

from __future__ import annotations

import math
from collections.abc import Iterable

from megatron_longpo.errors import UserError

CONTEXT = "parallel.context"


def kv_repeats(num_heads: int, num_kv_heads: int, size: int, *, key: str = CONTEXT) -> int:
    """Returns how often `a2a` repeats each key/value head so that `size` ranks get equal shares.

    Raises:
        UserError: if the heads cannot be shared out; it names sizes that can, and the setting
            `key`.
    """
    if not _shares_out(num_heads, num_kv_heads, size):
        fitting = [
            str(other)
            for other in range(1, num_heads + 1)
            if _shares_out(num_heads, num_kv_heads, other)
        ]
        raise UserError(
            f"{key} ({size}): a2a cannot share {num_heads} heads and {num_kv_heads} "
            f"key/value heads (of a tensor-parallel rank) out over that many ranks; use "
            f"{', '.join(fitting)}, or parallel.context_comm all_gather, which takes any size"
        )
    return math.lcm(num_kv_heads, size) // num_kv_heads


def largest_inner(context: int, heads: Iterable[tuple[int, int]], *, neighbours: int) -> int:
    """Returns the largest number of ranks, of `context` in all, that `a2a` can share heads over.

    Args:
        context: context-parallel ranks.
        heads: of every model, query and key/value heads of a tensor-parallel rank.
        neighbours: ranks on one machine. A group of ranks stays on one machine.
    """
    models = list(heads)
    sizes = [
        size
        for size in range(2, context + 1)
        if context % size == 0 and size <= neighbours and neighbours % size == 0
    ]
    return max(
        (size for size in sizes if all(_shares_out(*of_model, size) for of_model in models)),
        default=1,
    )


def _shares_out(num_heads: int, num_kv_heads: int, size: int) -> bool:
    """Whether `size` ranks get equal shares of the heads."""
    return num_heads % math.lcm(num_kv_heads, size) == 0
