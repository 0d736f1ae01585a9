"""FlashAttention 4, the package flash-attn-4: the fastest attention that was measured on Hopper.

Its kernels are written in CuTe and compiled for a head size, once for causal blocks and once for
rectangles, in about ten seconds. Lengths are data, so new ones compile nothing.
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

from torch import Tensor

from megatron_longpo.model.attention.blocks import Attended, Block, Gradients, block_ends

SHORTEST_DENSE_BLOCK = 2_048
"""A single causal block of so many tokens is called as a dense batch, which is 1.5 % faster. It is
a kernel of its own, which rows too short to gain from it need not wait for."""


class FlashAttention4Kernel:
    """FlashAttention 4 for all blocks: causal ones and rectangles, many in one call."""

    def __init__(self) -> None:
        # Read when the package is imported: the next run finds the compiled kernels on disk.
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
        self._package: Any = importlib.import_module("flash_attn.cute.interface")
        # The compiler says so of every kernel without a mask function.
        warnings.filterwarnings("ignore", message=r"Argument aux_data .* cannot be converted")

    def forward(self, block: Block) -> Attended:
        """Returns output and log-sum-exp, in one call for all blocks."""
        output, logsumexp, *_ = self._package._flash_attn_fwd(
            _batched(block.query, block),
            _batched(block.key, block),
            _batched(block.value, block),
            softmax_scale=block.scale,
            causal=block.causal,
            return_lse=True,
            **_lengths(block),
        )
        if _is_dense(block):
            return Attended(output[0], logsumexp[0])
        return Attended(output, logsumexp)

    def backward(self, block: Block, attended: Attended, output_grad: Tensor) -> Gradients:
        """Returns the gradients of query, key and value, in one call for all blocks."""
        query_grad, key_grad, value_grad, *_ = self._package._flash_attn_bwd(
            _batched(block.query, block),
            _batched(block.key, block),
            _batched(block.value, block),
            _batched(attended.output, block),
            _batched(output_grad, block),
            _batched(attended.logsumexp.contiguous(), block),
            block.scale,
            block.causal,
            **_lengths(block),
        )
        if _is_dense(block):
            return query_grad[0], key_grad[0], value_grad[0]
        return query_grad, key_grad, value_grad


def _is_dense(block: Block) -> bool:
    return block.is_one and block.causal and len(block.query) >= SHORTEST_DENSE_BLOCK


def _batched(tensor: Tensor, block: Block) -> Tensor:
    """[t,...] -> [1,t,...] for a dense block."""
    return tensor[None] if _is_dense(block) else tensor


def _lengths(block: Block) -> dict[str, Any]:
    if _is_dense(block):
        return {}
    device = block.query.device
    return {
        "cu_seqlens_q": block_ends(block.query_lengths, device),
        "cu_seqlens_k": block_ends(block.key_lengths, device),
        "max_seqlen_q": max(block.query_lengths),
        "max_seqlen_k": max(block.key_lengths),
    }
