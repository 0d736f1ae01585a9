"""Attention kernels of GPUs, behind the interface of kernels.py; bf16 and fp16 only.

These take one block a call; those of varlen_kernels.py take many. None repeats key/value heads: all
of them share a key/value head among its query heads.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from megatron_longpo.model.attention.kernels import BlockByBlock

SMALLEST_CUDNN_BLOCK = 128
"""Fewer queries or keys than this go to the flash kernel: torch has cuDNN compile a plan for
every new shape, and a branch's own block has a new one in every pair."""


class FlashKernel(BlockByBlock):
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
        no_dropout = no_dropout_state(torch.uint64, query.device)
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
            no_dropout,
            no_dropout,
            scale=scale,
        )
        return query_grad.squeeze(0), key_grad.squeeze(0), value_grad.squeeze(0)


class CudnnKernel(BlockByBlock):
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
        no_dropout = no_dropout_state(torch.int64, query.device, size=())
        # torch keeps plans by the strides of query, key and value alone: output and its gradient
        # must have the same ones in every call.
        gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            _heads_first(output_grad.contiguous()),
            _heads_first(query),
            _heads_first(key),
            _heads_first(value),
            _heads_first(output.contiguous()),
            statistics,
            no_dropout,
            no_dropout,
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


class FlashAttnKernel(BlockByBlock):
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


@functools.cache
def no_dropout_state(
    dtype: torch.dtype, device: torch.device, *, size: tuple[int, ...] = (2,)
) -> Tensor:
    """Zeros: the random numbers of a dropout that there is none of; only read."""
    return torch.zeros(size, dtype=dtype, device=device)
