"""Long causal blocks by a kernel that is faster but wants few different lengths.

torch has cuDNN compile a plan for every new length, a quarter of a second each, and documents have
a new one in every pair. A long causal block is therefore called with its length rounded up: the
tokens behind it are seen by none of its own, and what they give is dropped. All other blocks, whose
keys cannot be padded without a mask, go to a kernel that takes any length.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megatron_longpo.model.attention.kernels import AttentionKernel, BlockByBlock, padded

SHORTEST_LONG_BLOCK = 25_600
"""Tokens from which on a plan pays: 4 % of a shorter block are less than its share of a plan."""

STEPS = 400
"""A length is rounded up by less than a 400th, its work by less than 0.5 %; between one length and
twice that length there are at most 400 plans."""

UNSEEN = 1e30
"""Log-sum-exp of the queries that are dropped: gives each of their weights 0, with no infinity."""


class LongBlockKernel(BlockByBlock):
    """Causal blocks of `shortest` tokens and more by `long` at rounded lengths, others by `other`.

    What follows a block's rows in memory must be finite: rows of the same tensor, as here.
    """

    def __init__(
        self,
        *,
        long: AttentionKernel,
        other: AttentionKernel,
        shortest: int = SHORTEST_LONG_BLOCK,
        steps: int = STEPS,
    ) -> None:
        self.long = long
        self.other = other
        self.shortest = shortest
        self.steps = steps

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        tokens = len(query)
        if not causal or tokens < self.shortest:
            return self.other.forward(query, key, value, causal=causal, scale=scale)
        length = rounded(tokens, self.steps)
        output, logsumexp = self.long.forward(
            _lengthened(query, length),
            _lengthened(key, length),
            _lengthened(value, length),
            causal=True,
            scale=scale,
        )
        return output[:tokens], logsumexp[:, :tokens]

    def backward(
        self,
        output_grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        logsumexp: Tensor,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = len(query)
        if not causal or tokens < self.shortest:
            return self.other.backward(
                output_grad, query, key, value, output, logsumexp, causal=causal, scale=scale
            )
        length = rounded(tokens, self.steps)
        query_grad, key_grad, value_grad = self.long.backward(
            padded(output_grad, length),
            _lengthened(query, length),
            _lengthened(key, length),
            _lengthened(value, length),
            _lengthened(output, length),
            F.pad(logsumexp, (0, length - tokens), value=UNSEEN),
            causal=True,
            scale=scale,
        )
        return query_grad[:tokens], key_grad[:tokens], value_grad[:tokens]

    def forward_blocks(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], *, scale: float
    ) -> tuple[Tensor, Tensor]:
        if max(lengths) < self.shortest:
            return self.other.forward_blocks(query, key, value, lengths, scale=scale)
        return super().forward_blocks(query, key, value, lengths, scale=scale)

    def backward_blocks(
        self,
        output_grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        logsumexp: Tensor,
        lengths: tuple[int, ...],
        *,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (output_grad, query, key, value, output, logsumexp)
        if max(lengths) < self.shortest:
            return self.other.backward_blocks(*tensors, lengths, scale=scale)
        return super().backward_blocks(*tensors, lengths, scale=scale)


def rounded(length: int, steps: int = STEPS) -> int:
    """The next multiple of the largest power of two that is at most a `steps`-th of `length`."""
    step = 1 << max(0, (length // steps).bit_length() - 1)
    return -(-length // step) * step


def _lengthened(tensor: Tensor, length: int) -> Tensor:
    """[t,X,D] -> [length,X,D]: with the rows that follow in memory, a view; else with zeros.

    The values behind a causal block do not matter, and a copy of a long row takes time and memory.
    """
    shape = (length, *tensor.shape[1:])
    last = tensor.storage_offset() + sum(
        (size - 1) * stride for size, stride in zip(shape, tensor.stride(), strict=True)
    )
    if last < tensor.untyped_storage().nbytes() // tensor.element_size():
        return tensor.as_strided(shape, tensor.stride())
    return padded(tensor, length)
