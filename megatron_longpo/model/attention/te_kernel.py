"""cuDNN's attention through Transformer Engine: all blocks in one call, of any lengths."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from megatron_longpo.model.attention.blocks import Attended, Block, Gradients, block_ends
from megatron_longpo.model.attention.gpu_kernels import no_dropout_state
from megatron_longpo.model.attention.kernels import BlockByBlock


class TransformerEngineKernel(BlockByBlock):
    """cuDNN's attention through Transformer Engine.

    One plan serves all lengths of similar size; torch's way to the same kernels (`CudnnKernel`)
    compiles one for every length. Versions that return padded log-sum-exps get one block a call.
    """

    def __init__(self) -> None:
        self._te: Any = importlib.import_module(
            "transformer_engine.pytorch.cpp_extensions.fused_attn"
        )
        self.takes_many = True

    def forward(self, block: Block) -> Attended:
        """Returns output and log-sum-exp, in one call where the version allows it."""
        return self.forward_one(block) if self.takes_many else super().forward(block)

    def backward(self, block: Block, attended: Attended, output_grad: Tensor) -> Gradients:
        """Returns the gradients, in one call where the version allows it."""
        if self.takes_many:
            return self.backward_one(block, attended, output_grad)
        return super().backward(block, attended, output_grad)

    def forward_one(self, block: Block) -> Attended:
        """Returns output and log-sum-exp by one call."""
        query = block.query
        output, (statistics, *_), *_ = self._te.fused_attn_fwd(
            True,
            *_lengths(block),
            query.contiguous(),
            block.key.contiguous(),
            block.value.contiguous(),
            query.dtype,
            self._te.FusedAttnBackend["F16_arbitrary_seqlen"],
            o_format="thd",
            **_options(block),
        )
        # Log-sum-exps come as [q,H,1] or, from older versions, padded, as [blocks,H,q,1].
        self.takes_many = statistics.dim() == 3
        if self.takes_many:
            return Attended(output, statistics.squeeze(-1).T)
        assert block.is_one, "padded log-sum-exps are read of one block alone"
        return Attended(output, statistics[0, :, : len(query), 0])

    def backward_one(self, block: Block, attended: Attended, output_grad: Tensor) -> Gradients:
        """Returns the gradients of query, key and value by one call."""
        query, logsumexp = block.query, attended.logsumexp
        statistics = logsumexp.T.unsqueeze(-1) if self.takes_many else logsumexp[None, :, :, None]
        query_grad, key_grad, value_grad, *_ = self._te.fused_attn_bwd(
            *_lengths(block),
            query.contiguous(),
            block.key.contiguous(),
            block.value.contiguous(),
            attended.output.contiguous(),
            output_grad.contiguous(),
            query.dtype,
            [statistics.contiguous(), no_dropout_state(torch.int64, query.device)],
            self._te.FusedAttnBackend["F16_arbitrary_seqlen"],
            o_format="thd",
            do_format="thd",
            dqkv_layout="thd_thd_thd",
            **_options(block),
        )
        return query_grad, key_grad, value_grad


def _lengths(block: Block) -> tuple[int, int, Tensor, Tensor]:
    """Returns the longest lengths, and the ends, of queries and keys."""
    device = block.query.device
    return (
        max(block.query_lengths),
        max(block.key_lengths),
        block_ends(block.query_lengths, device),
        block_ends(block.key_lengths, device),
    )


def _options(block: Block) -> dict[str, Any]:
    _, _, query_ends, key_ends = _lengths(block)
    return {
        "cu_seqlens_q_padded": query_ends,
        "cu_seqlens_kv_padded": key_ends,
        "attn_scale": block.scale,
        "qkv_layout": "thd_thd_thd",
        "attn_mask_type": "padding_causal" if block.causal else "padding",
        "window_size": (-1, 0) if block.causal else (-1, -1),
    }
