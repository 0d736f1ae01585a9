"""Attention kernels of GPUs, behind the interface of kernels.py; bf16 and fp16 only.

None repeats key/value heads: all of them share a key/value head among its query heads.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

SMALLEST_CUDNN_BLOCK = 128
"""Fewer queries or keys than this go to the flash kernel: torch has cuDNN compile a plan for
every new shape, and a branch's own block has a new one in every pair."""


class FlashKernel:
    """FlashAttention 2 as torch ships it, the kernel behind `scaled_dot_product_attention`."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        output, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
            query[None],
            key[None],
            value[None],
            None,
            None,
            query.shape[0],
            key.shape[0],
            0.0,
            causal,
            False,
            scale=scale,
        )
        return output.squeeze(0), logsumexp.squeeze(0)

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
        no_dropout_state = torch.zeros(2, dtype=torch.uint64, device=query.device)
        query_grad, key_grad, value_grad = torch.ops.aten._flash_attention_backward(
            output_grad[None],
            query[None],
            key[None],
            value[None],
            output[None],
            # The kernel reads it without regard to strides.
            logsumexp.contiguous()[None],
            None,
            None,
            query.shape[0],
            key.shape[0],
            0.0,
            causal,
            no_dropout_state,
            no_dropout_state,
            scale=scale,
        )
        return query_grad.squeeze(0), key_grad.squeeze(0), value_grad.squeeze(0)


class VarlenKernel:
    """The same operator called as `torch.nn.attention.varlen` calls it.

    Worth a setting of its own where `torch.nn.attention.activate_flash_attention_impl` has put
    a newer FlashAttention behind that operator.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        output, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            _one_sequence(query),
            _one_sequence(key),
            query.shape[0],
            key.shape[0],
            0.0,
            causal,
            False,
            scale=scale,
        )
        return output, logsumexp

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
        no_dropout_state = torch.zeros(2, dtype=torch.uint64, device=query.device)
        query_grad, key_grad, value_grad = torch.ops.aten._flash_attention_backward(
            output_grad,
            query,
            key,
            value,
            output,
            logsumexp.contiguous(),
            _one_sequence(query),
            _one_sequence(key),
            query.shape[0],
            key.shape[0],
            0.0,
            causal,
            no_dropout_state,
            no_dropout_state,
            scale=scale,
        )
        return query_grad, key_grad, value_grad


class CudnnKernel:
    """cuDNN's attention through torch; blocks too small for it go to `FlashKernel`."""

    def __init__(self) -> None:
        self._small = FlashKernel()
        # torch has changed between [1,H,q] and [1,H,q,1]; backward wants what forward gives.
        self._logsumexp_dims = 4

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        if min(len(query), len(key)) < SMALLEST_CUDNN_BLOCK:
            return self._small.forward(query, key, value, causal=causal, scale=scale)
        output, logsumexp, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            _heads_first(query),
            _heads_first(key),
            _heads_first(value),
            None,
            True,
            0.0,
            causal,
            False,
            scale=scale,
        )
        self._logsumexp_dims = logsumexp.dim()
        return output.squeeze(0).transpose(0, 1), logsumexp.reshape(query.shape[1], len(query))

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
        if min(len(query), len(key)) < SMALLEST_CUDNN_BLOCK:
            return self._small.backward(
                output_grad, query, key, value, output, logsumexp, causal=causal, scale=scale
            )
        statistics = logsumexp.contiguous()[None]
        if self._logsumexp_dims == 4:
            statistics = statistics.unsqueeze(-1)
        no_dropout_state = torch.zeros((), dtype=torch.int64, device=query.device)
        # torch keeps plans by the strides of query, key and value alone: output and its gradient
        # must have the same ones in every call.
        gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            _heads_first(output_grad.contiguous()),
            _heads_first(query),
            _heads_first(key),
            _heads_first(value),
            _heads_first(output.contiguous()),
            statistics,
            no_dropout_state,
            no_dropout_state,
            None,
            None,
            None,
            query.shape[0],
            key.shape[0],
            0.0,
            causal,
            scale=scale,
        )
        query_grad, key_grad, value_grad = (
            gradient.squeeze(0).transpose(0, 1) for gradient in gradients
        )
        return query_grad, key_grad, value_grad


class TransformerEngineKernel:
    """cuDNN's attention through Transformer Engine, in its layout of variable lengths.

    In that layout lengths are data, so that one plan serves all of similar size; torch's way to
    the same kernels (`CudnnKernel`) compiles one for every length.
    """

    def __init__(self) -> None:
        self._te: Any = importlib.import_module(
            "transformer_engine.pytorch.cpp_extensions.fused_attn"
        )
        # Whether log-sum-exps come as [q,H,1] or, from older versions, as [1,H,q,1].
        self._is_packed = True

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        lengths_q, lengths_k = _one_sequence(query), _one_sequence(key)
        output, (statistics, *_), *_ = self._te.fused_attn_fwd(
            True,
            query.shape[0],
            key.shape[0],
            lengths_q,
            lengths_k,
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            query.dtype,
            self._te.FusedAttnBackend["F16_arbitrary_seqlen"],
            cu_seqlens_q_padded=lengths_q,
            cu_seqlens_kv_padded=lengths_k,
            attn_scale=scale,
            o_format="thd",
            **_te_mask(causal),
        )
        self._is_packed = statistics.dim() == 3
        if self._is_packed:
            return output, statistics.squeeze(-1).T
        return output, statistics[0, :, : len(query), 0]

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
        lengths_q, lengths_k = _one_sequence(query), _one_sequence(key)
        statistics = logsumexp.T.unsqueeze(-1) if self._is_packed else logsumexp[None, :, :, None]
        no_dropout_state = torch.zeros(2, dtype=torch.int64, device=query.device)
        query_grad, key_grad, value_grad, *_ = self._te.fused_attn_bwd(
            query.shape[0],
            key.shape[0],
            lengths_q,
            lengths_k,
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            output.contiguous(),
            output_grad.contiguous(),
            query.dtype,
            [statistics.contiguous(), no_dropout_state],
            self._te.FusedAttnBackend["F16_arbitrary_seqlen"],
            cu_seqlens_q_padded=lengths_q,
            cu_seqlens_kv_padded=lengths_k,
            attn_scale=scale,
            o_format="thd",
            do_format="thd",
            dqkv_layout="thd_thd_thd",
            **_te_mask(causal),
        )
        return query_grad, key_grad, value_grad


class FlashAttnKernel:
    """The package flash-attn, 2.7 or newer: on GPUs before Hopper as fast as any."""

    def __init__(self) -> None:
        self._package: Any = importlib.import_module("flash_attn.flash_attn_interface")

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        output, logsumexp, *_ = self._package._flash_attn_forward(
            query[None],
            key[None],
            value[None],
            dropout_p=0.0,
            softmax_scale=scale,
            causal=causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            return_softmax=False,
        )
        return output.squeeze(0), logsumexp.squeeze(0)

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
        gradients = [torch.empty_like(tensor.contiguous()) for tensor in (query, key, value)]
        self._package._flash_attn_backward(
            output_grad.contiguous()[None],
            query[None],
            key[None],
            value[None],
            output.contiguous()[None],
            logsumexp.contiguous()[None],
            *(gradient[None] for gradient in gradients),
            dropout_p=0.0,
            softmax_scale=scale,
            causal=causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=False,
        )
        query_grad, key_grad, value_grad = gradients
        return query_grad, key_grad, value_grad


def _heads_first(tensor: Tensor) -> Tensor:
    """[t,H,D] -> [1,H,t,D], a view."""
    return tensor[None].transpose(1, 2)


def _one_sequence(tensor: Tensor) -> Tensor:
    """[t,...] -> [2] int32, 0 and t: made on the device, so that nothing waits for a copy."""
    length = len(tensor)
    return torch.arange(0, length + 1, length, dtype=torch.int32, device=tensor.device)


def _te_mask(causal: bool) -> dict[str, Any]:
    return {
        "qkv_layout": "thd_thd_thd",
        "attn_mask_type": "padding_causal" if causal else "padding",
        "window_size": (-1, 0) if causal else (-1, -1),
    }
