"""What an attention kernel is given and what it returns.

Letters: q queries, k keys, H heads, G key/value heads (H is a multiple of G), D head size.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Lengths = tuple[int, ...]
"""Tokens of each block."""
Gradients = tuple[Tensor, Tensor, Tensor]
"""Of query [q,H,D], key [k,G,D] and value [k,G,D]."""


class Attended(NamedTuple):
    """The result of attention, which backward takes too."""

    output: Tensor
    """[q,H,D]."""
    logsumexp: Tensor
    """[H,q] fp32 or fp64: log of the sum of exponentials of each query's scores."""

    def rows(self, queries: slice) -> Attended:
        """Returns the results of these queries."""
        return Attended(self.output[queries], self.logsumexp[:, queries])


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Queries and the keys that they attend: one block, or several one behind the other.

    Block i holds `query_lengths[i]` queries, which attend its `key_lengths[i]` keys. In a causal
    block there are as many keys as queries, and query n attends keys 0 to n.
    """

    query: Tensor
    """[q,H,D]."""
    key: Tensor
    """[k,G,D]."""
    value: Tensor
    """[k,G,D]."""
    query_lengths: Lengths
    key_lengths: Lengths
    causal: bool
    scale: float
    """Scores are scale * query . key."""

    @property
    def is_one(self) -> bool:
        """Whether the tensors hold a single block."""
        return len(self.query_lengths) == 1

    def each(self) -> Iterator[tuple[slice, slice, Block]]:
        """Yields every block alone, after the rows of its queries and of its keys."""
        for queries, keys in zip(_spans(self.query_lengths), _spans(self.key_lengths), strict=True):
            yield (
                queries,
                keys,
                one_block(
                    self.query[queries],
                    self.key[keys],
                    self.value[keys],
                    causal=self.causal,
                    scale=self.scale,
                ),
            )


def one_block(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> Block:
    """Returns the block in which all of `query` attends all of `key`, or causally."""
    return Block(
        query=query,
        key=key,
        value=value,
        query_lengths=(len(query),),
        key_lengths=(len(key),),
        causal=causal,
        scale=scale,
    )


def causal_blocks(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, *, scale: float
) -> Block:
    """Returns causal blocks of these lengths."""
    return Block(
        query=query,
        key=key,
        value=value,
        query_lengths=lengths,
        key_lengths=lengths,
        causal=True,
        scale=scale,
    )


@functools.lru_cache(maxsize=1024)
def block_ends(lengths: Lengths, device: torch.device) -> Tensor:
    """Returns [blocks + 1] int32 on `device`: 0, and where each block ends.

    Every layer of a pack gets the same tensor. Nothing waits for the copy to the device.
    """
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return ends.to(device, non_blocking=True)


def _spans(lengths: Lengths) -> Iterator[slice]:
    ends = [0, *itertools.accumulate(lengths)]
    return (slice(start, stop) for start, stop in itertools.pairwise(ends))
