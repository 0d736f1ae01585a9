"""Attention kernels of GPUs that take many blocks at once, their lengths being data.

They take tensors of all blocks one behind the other, and where each block ends.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from megatron_longpo.model.attention.gpu_kernels import no_dropout_state
from megatron_longpo.model.attention.kernels import BlockByBlock

Lengths = tuple[int, ...]
"""Rows of each block."""
Tensors = tuple[Tensor, ...]
"""What `forward` takes (query, key, value), or `backward`: its six."""


class _VariableLengths(BlockByBlock, ABC):
    """A kernel with `_forward` and `_backward` for blocks of any number and length."""

    takes_many = True

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        lengths = (len(query),), (len(key),)
        return self._forward((query, key, value), *lengths, causal=causal, scale=scale)

    def forward_blocks(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, *, scale: float
    ) -> tuple[Tensor, Tensor]:
        if not self.takes_many:
            return super().forward_blocks(query, key, value, lengths, scale=scale)
        return self._forward((query, key, value), lengths, lengths, causal=True, scale=scale)

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
        tensors = (output_grad, query, key, value, output, logsumexp)
        return self._backward(tensors, (len(query),), (len(key),), causal=causal, scale=scale)

    def backward_blocks(
        self,
        output_grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        logsumexp: Tensor,
        lengths: Lengths,
        *,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (output_grad, query, key, value, output, logsumexp)
        if not self.takes_many:
            return super().backward_blocks(*tensors, lengths, scale=scale)
        return self._backward(tensors, lengths, lengths, causal=True, scale=scale)

    @abstractmethod
    def _forward(
        self, tensors: Tensors, queries: Lengths, keys: Lengths, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention of each sequence of queries over its own of keys."""

    @abstractmethod
    def _backward(
        self, tensors: Tensors, queries: Lengths, keys: Lengths, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Its gradients."""


class VarlenKernel(_VariableLengths):
    """FlashAttention 2 as `torch.nn.attention.varlen` calls it.

    Worth a setting of its own where `torch.nn.attention.activate_flash_attention_impl` has put
    a newer FlashAttention behind that operator.
    """

    def _forward(
        self, tensors: Tensors, queries: Lengths, keys: Lengths, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        query, key, value = tensors
        output, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            _ends(queries, query.device),
            _ends(keys, query.device),
            max(queries),
            max(keys),
            0.0,
            causal,
            False,
            scale=scale,
        )
        return output, logsumexp

    def _backward(
        self, tensors: Tensors, queries: Lengths, keys: Lengths, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        output_grad, query, key, value, output, logsumexp = tensors
        no_dropout = no_dropout_state(torch.uint64, query.device)
        query_grad, key_grad, value_grad = torch.ops.aten._flash_attention_backward(
            output_grad,
            query,
            key,
            value,
            output,
            logsumexp.contiguous(),
            _ends(queries, query.device),
            _ends(keys, query.device),
            max(queries),
            max(keys),
            0.0,
            causal,
            no_dropout,
            no_dropout,
            scale=scale,
        )
        return query_grad, key_grad, value_grad


class TransformerEngineKernel(_VariableLengths):
    """cuDNN's attention through Transformer Engine.

    One plan serves all lengths of similar size; torch's way to the same kernels (`CudnnKernel`)
    compiles one for every length.
    """

    def __init__(self) -> None:
        self._te: Any = importlib.import_module(
            "transformer_engine.pytorch.cpp_extensions.fused_attn"
        )

    def _forward(
        self, tensors: Tensors, queries: Lengths, keys: Lengths, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        query, key, value = tensors
        query_ends, key_ends = (_ends(lengths, query.device) for lengths in (queries, keys))
        output, (statistics, *_), *_ = self._te.fused_attn_fwd(
            True,
            max(queries),
            max(keys),
            query_ends,
            key_ends,
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            query.dtype,
            self._te.FusedAttnBackend["F16_arbitrary_seqlen"],
            cu_seqlens_q_padded=query_ends,
            cu_seqlens_kv_padded=key_ends,
            attn_scale=scale,
            o_format="thd",
            **_te_mask(causal),
        )
        # Log-sum-exps come as [q,H,1] or, from older versions, padded, as [blocks,H,q,1].
        self.takes_many = statistics.dim() == 3
        if self.takes_many:
            return output, statistics.squeeze(-1).T
        assert len(queries) == 1, "padded log-sum-exps are read of one block alone"
        return output, statistics[0, :, : len(query), 0]

    def _backward(
        self, tensors: Tensors, queries: Lengths, keys: Lengths, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        output_grad, query, key, value, output, logsumexp = tensors
        query_ends, key_ends = (_ends(lengths, query.device) for lengths in (queries, keys))
        statistics = logsumexp.T.unsqueeze(-1) if self.takes_many else logsumexp[None, :, :, None]
        query_grad, key_grad, value_grad, *_ = self._te.fused_attn_bwd(
            max(queries),
            max(keys),
            query_ends,
            key_ends,
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            output.contiguous(),
            output_grad.contiguous(),
            query.dtype,
            [statistics.contiguous(), no_dropout_state(torch.int64, query.device)],
            self._te.FusedAttnBackend["F16_arbitrary_seqlen"],
            cu_seqlens_q_padded=query_ends,
            cu_seqlens_kv_padded=key_ends,
            attn_scale=scale,
            o_format="thd",
            do_format="thd",
            dqkv_layout="thd_thd_thd",
            **_te_mask(causal),
        )
        return query_grad, key_grad, value_grad


@functools.lru_cache(maxsize=1024)
def _ends(lengths: Lengths, device: torch.device) -> Tensor:
    """[sequences + 1] int32: 0, and where each sequence ends; made once for all layers of a pack.

    Nothing waits for the copy to the device.
    """
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return ends.to(device, non_blocking=True)


def _te_mask(causal: bool) -> dict[str, Any]:
    return {
        "qkv_layout": "thd_thd_thd",
        "attn_mask_type": "padding_causal" if causal else "padding",
        "window_size": (-1, 0) if causal else (-1, -1),
    }
