"""Attention kernels of GPUs that come with torch or flash-attn; bf16 and fp16 only.

None repeats key/value heads: each shares a key/value head among its query heads.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from megatron_longpo.model.attention.blocks import Attended, Block, Gradients, block_ends
from megatron_longpo.model.attention.kernels import BlockByBlock

SMALLEST_CUDNN_BLOCK = 128
"""Blocks with fewer queries or keys than this go to the flash kernel: torch has cuDNN compile a
plan for every new shape, and a branch's own block has a new one in every pair."""


class FlashKernel:
    """FlashAttention 2 as torch ships it, behind `scaled_dot_product_attention`.

    `torch.nn.attention.varlen` calls the same operator. If
    `torch.nn.attention.activate_flash_attention_impl` has put a newer FlashAttention behind it,
    that one runs.
    """

    def forward(self, block: Block) -> Attended:
        """Returns output and log-sum-exp, in one call for all blocks."""
        output, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
            _batched(block.query, block),
            _batched(block.key, block),
            _batched(block.value, block),
            *_operator_lengths(block),
            0.0,
            block.causal,
            False,
            scale=block.scale,
        )
        if block.is_one:
            return Attended(output.squeeze(0), logsumexp.squeeze(0))
        return Attended(output, logsumexp)

    def backward(self, block: Block, attended: Attended, output_grad: Tensor) -> Gradients:
        """Returns the gradients of query, key and value, in one call for all blocks."""
        no_dropout = no_dropout_state(torch.uint64, block.query.device)
        query_grad, key_grad, value_grad = torch.ops.aten._flash_attention_backward(
            _batched(output_grad, block),
            _batched(block.query, block),
            _batched(block.key, block),
            _batched(block.value, block),
            _batched(attended.output, block),
            # The kernel ignores its strides.
            _batched(attended.logsumexp.contiguous(), block),
            *_operator_lengths(block),
            0.0,
            block.causal,
            no_dropout,
            no_dropout,
            scale=block.scale,
        )
        if block.is_one:
            return query_grad.squeeze(0), key_grad.squeeze(0), value_grad.squeeze(0)
        return query_grad, key_grad, value_grad


def _batched(tensor: Tensor, block: Block) -> Tensor:
    """[t,...] -> [1,t,...] for one block; the operator takes several blocks as they are."""
    return tensor[None] if block.is_one else tensor


def _operator_lengths(block: Block) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Returns the ends of the blocks and the longest lengths; for one block it has no ends."""
    device = block.query.device
    return (
        None if block.is_one else block_ends(block.query_lengths, device),
        None if block.is_one else block_ends(block.key_lengths, device),
        max(block.query_lengths),
        max(block.key_lengths),
    )


class CudnnKernel(BlockByBlock):
    """cuDNN's attention through torch; blocks too small for it go to `FlashKernel`."""

    def __init__(self) -> None:
        self._small = FlashKernel()
        # torch has changed between [1,H,q] and [1,H,q,1]; backward wants what forward gives.
        self._logsumexp_dims = 4

    def forward_one(self, block: Block) -> Attended:
        """Returns output and log-sum-exp of one block."""
        query = block.query
        if min(len(query), len(block.key)) < SMALLEST_CUDNN_BLOCK:
            return self._small.forward(block)
        output, logsumexp, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            _heads_first(query),
            _heads_first(block.key),
            _heads_first(block.value),
            None,
            True,
            0.0,
            block.causal,
            False,
            scale=block.scale,
        )
        self._logsumexp_dims = logsumexp.dim()
        return Attended(
            output.squeeze(0).transpose(0, 1), logsumexp.reshape(query.shape[1], len(query))
        )

    def backward_one(self, block: Block, attended: Attended, output_grad: Tensor) -> Gradients:
        """Returns the gradients of one block."""
        query = block.query
        if min(len(query), len(block.key)) < SMALLEST_CUDNN_BLOCK:
            return self._small.backward(block, attended, output_grad)
        statistics = attended.logsumexp.contiguous()[None]
        if self._logsumexp_dims == 4:
            statistics = statistics.unsqueeze(-1)
        no_dropout = no_dropout_state(torch.int64, query.device, size=())
        # torch keeps plans by the strides of query, key and value alone: output and its gradient
        # must have the same ones in every call.
        gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            _heads_first(output_grad.contiguous()),
            _heads_first(query),
            _heads_first(block.key),
            _heads_first(block.value),
            _heads_first(attended.output.contiguous()),
            statistics,
            no_dropout,
            no_dropout,
            None,
            None,
            None,
            len(query),
            len(block.key),
            0.0,
            block.causal,
            scale=block.scale,
        )
        query_grad, key_grad, value_grad = (
            gradient.squeeze(0).transpose(0, 1) for gradient in gradients
        )
        return query_grad, key_grad, value_grad


class FlashAttnKernel(BlockByBlock):
    """The package flash-attn, 2.7 or newer: on GPUs before Hopper as fast as any."""

    def __init__(self) -> None:
        self._package: Any = importlib.import_module("flash_attn.flash_attn_interface")

    def forward_one(self, block: Block) -> Attended:
        """Returns output and log-sum-exp of one block."""
        output, logsumexp, *_ = self._package._flash_attn_forward(
            block.query[None],
            block.key[None],
            block.value[None],
            return_softmax=False,
            **self._options(block),
        )
        return Attended(output.squeeze(0), logsumexp.squeeze(0))

    def backward_one(self, block: Block, attended: Attended, output_grad: Tensor) -> Gradients:
        """Returns the gradients of one block."""
        inputs = (block.query, block.key, block.value)
        query_grad, key_grad, value_grad = (torch.empty_like(x.contiguous()) for x in inputs)
        self._package._flash_attn_backward(
            output_grad.contiguous()[None],
            block.query[None],
            block.key[None],
            block.value[None],
            attended.output.contiguous()[None],
            attended.logsumexp.contiguous()[None],
            query_grad[None],
            key_grad[None],
            value_grad[None],
            deterministic=False,
            **self._options(block),
        )
        return query_grad, key_grad, value_grad

    @staticmethod
    def _options(block: Block) -> dict[str, Any]:
        return {
            "dropout_p": 0.0,
            "softmax_scale": block.scale,
            "causal": block.causal,
            "window_size_left": -1,
            "window_size_right": -1,
            "softcap": 0.0,
            "alibi_slopes": None,
        }


def _heads_first(tensor: Tensor) -> Tensor:
    """[t,H,D] -> [1,H,t,D], a view."""
    return tensor[None].transpose(1, 2)


@functools.cache
def no_dropout_state(
    dtype: torch.dtype, device: torch.device, *, size: tuple[int, ...] = (2,)
) -> Tensor:
    """Returns zeros for the random state that a kernel without dropout takes and never uses."""
    return torch.zeros(size, dtype=dtype, device=device)
