"""Long causal blocks by a kernel that is faster but wants few different lengths.

torch has cuDNN compile a plan for every new length, a quarter of a second each, and documents have
a new one in every pair. A long causal block is therefore run with its length rounded up: none of
its tokens attends those behind it, and the results of these are dropped. All other blocks, whose
keys cannot be padded without a mask, go to a kernel that takes any length.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megatron_longpo.model.attention.blocks import Attended, Block, Gradients, one_block
from megatron_longpo.model.attention.kernels import AttentionKernel, BlockByBlock, padded

SHORTEST_LONG_BLOCK = 25_600
"""Tokens from which a plan pays: 4 % of a shorter block's time is less than its share of one."""

STEPS = 400
"""A length is rounded up by less than a 400th, its work by less than 0.5 %; between one length and
twice that length there are at most 400 plans."""

UNSEEN = 1e30
"""Log-sum-exp of the queries that are dropped: makes all their weights 0, without an infinity."""


class LongBlockKernel(BlockByBlock):
    """Runs long causal blocks by `long` at rounded lengths, and all others by `other`.

    Long are `shortest` tokens or more. What follows a block's rows in memory must be finite: here
    it is rows of the same tensor.
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

    def forward(self, block: Block) -> Attended:
        """Returns output and log-sum-exp; blocks none of which is long go to `other` together."""
        return super().forward(block) if self._has_long(block) else self.other.forward(block)

    def backward(self, block: Block, attended: Attended, output_grad: Tensor) -> Gradients:
        """Returns the gradients of query, key and value; the blocks go where forward sent them."""
        if self._has_long(block):
            return super().backward(block, attended, output_grad)
        return self.other.backward(block, attended, output_grad)

    def forward_one(self, block: Block) -> Attended:
        """Returns output and log-sum-exp of one block."""
        if not self._has_long(block):
            return self.other.forward(block)
        tokens = len(block.query)
        attended = self.long.forward(_lengthened_block(block, rounded(tokens, self.steps)))
        return attended.rows(slice(0, tokens))

    def backward_one(self, block: Block, attended: Attended, output_grad: Tensor) -> Gradients:
        """Returns the gradients of one block."""
        if not self._has_long(block):
            return self.other.backward(block, attended, output_grad)
        tokens = len(block.query)
        length = rounded(tokens, self.steps)
        lengthened = Attended(
            _lengthened(attended.output, length),
            F.pad(attended.logsumexp, (0, length - tokens), value=UNSEEN),
        )
        query_grad, key_grad, value_grad = self.long.backward(
            _lengthened_block(block, length), lengthened, padded(output_grad, length)
        )
        return query_grad[:tokens], key_grad[:tokens], value_grad[:tokens]

    def _has_long(self, block: Block) -> bool:
        return block.causal and max(block.query_lengths) >= self.shortest


def rounded(length: int, steps: int = STEPS) -> int:
    """Rounds `length` up to a multiple of the largest power of two up to its `steps`-th part."""
    step = 1 << max(0, (length // steps).bit_length() - 1)
    return -(-length // step) * step


def _lengthened_block(block: Block, length: int) -> Block:
    """Returns one causal block with what follows it in memory, `length` tokens in all."""
    query, key, value = (
        _lengthened(tensor, length) for tensor in (block.query, block.key, block.value)
    )
    return one_block(query, key, value, causal=True, scale=block.scale)


def _lengthened(tensor: Tensor, length: int) -> Tensor:
    """[t,X,D] -> [length,X,D]: a view with the rows that follow in memory, else a copy with zeros.

    The values behind a causal block do not matter, and a copy of a long row takes time and memory.
    """
    shape = (length, *tensor.shape[1:])
    last = tensor.storage_offset() + sum(
        (size - 1) * stride for size, stride in zip(shape, tensor.stride(), strict=True)
    )
    if last < tensor.untyped_storage().nbytes() // tensor.element_size():
        return tensor.as_strided(shape, tensor.stride())
    return padded(tensor, length)
