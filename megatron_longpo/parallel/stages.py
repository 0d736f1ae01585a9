"""How a model's layers are split into the stages of a pipeline.

A split is the number of layers of every stage in the order in which a token passes them: with a
virtual pipeline of v chunks and p ranks, stage s is chunk s // p of rank s % p. The embedding is
always on the first stage and the output layer on the last, which may have no layer of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

Split = tuple[int, ...]


def even_split(num_layers: int, num_stages: int) -> Split:
    """Splits layers as evenly as possible; the last stages have fewer, as they compute the loss."""
    return tuple(
        num_layers // num_stages + (stage < num_layers % num_stages) for stage in range(num_stages)
    )


def like_split(num_layers: int, split: Sequence[int]) -> Split:
    """Splits another model's layers in the proportions of `split`; as many layers give `split`."""
    total, before = sum(split), 0
    cuts = [0]
    for layers in split:
        before += layers
        # The nearest whole number, halves up.
        cuts.append((2 * before * num_layers + total) // (2 * total))
    return tuple(stop - start for start, stop in itertools.pairwise(cuts))


def megatron_layout(split: Sequence[int]) -> list[list[str]] | None:
    """Returns the split as Megatron's `pipeline_model_parallel_layout`.

    None = all stages have as many layers, as Megatron itself splits them.
    """
    if len(set(split)) == 1:
        return None
    stages = [["decoder"] * layers for layers in split]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages
