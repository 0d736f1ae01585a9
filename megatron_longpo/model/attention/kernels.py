"""Attention kernels: one block of queries against one block of keys, forward and backward.

A kernel returns the log-sum-exp of its scores beside its output, so that blocks over different
keys can be merged exactly, and takes the merged output and log-sum-exp in backward, which makes
each block's gradients those of the whole (Milakov and Gimelshein 2018; Dao 2023). Those of GPUs
are in gpu_kernels.py, and in varlen_kernels.py where they take many blocks a call; kernel_choice.py
chooses.

Letters: q queries, k keys, H heads, G key/value heads (H is a multiple of G), D head size.
"""

from __future__ import annotations

import itertools
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class AttentionKernel(Protocol):
    """Attention between two blocks; causal blocks are square and start at the same token."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """[q,H,D], [k,G,D], [k,G,D] -> output [q,H,D] and log-sum-exp [H,q] in fp32 or better."""
        ...

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
        """Gradients of query, key and value; `output` and `logsumexp` are over all keys."""
        ...

    def forward_blocks(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], *, scale: float
    ) -> tuple[Tensor, Tensor]:
        """`forward` of causal blocks of these lengths, one behind the other in all tensors."""
        ...

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
        """`backward` of the same."""
        ...


class BlockByBlock:
    """For kernels that take one block a call."""

    def forward_blocks(
        self: AttentionKernel,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[int, ...],
        *,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        if len(lengths) == 1:
            return self.forward(query, key, value, causal=True, scale=scale)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        logsumexp = torch.empty(
            query.shape[1],
            query.shape[0],
            dtype=torch.promote_types(query.dtype, torch.float32),
            device=query.device,
        )
        for rows in _consecutive(lengths):
            output[rows], logsumexp[:, rows] = self.forward(
                query[rows], key[rows], value[rows], causal=True, scale=scale
            )
        return output, logsumexp

    def backward_blocks(
        self: AttentionKernel,
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
        if len(lengths) == 1:
            return self.backward(
                output_grad, query, key, value, output, logsumexp, causal=True, scale=scale
            )
        query_grad, key_grad, value_grad = (
            torch.empty_like(tensor, memory_format=torch.contiguous_format)
            for tensor in (query, key, value)
        )
        for rows in _consecutive(lengths):
            query_grad[rows], key_grad[rows], value_grad[rows] = self.backward(
                output_grad[rows],
                query[rows],
                key[rows],
                value[rows],
                output[rows],
                logsumexp[:, rows],
                causal=True,
                scale=scale,
            )
        return query_grad, key_grad, value_grad


class CpuFlashKernel(BlockByBlock):
    """The flash kernel behind `scaled_dot_product_attention` on CPUs; fp64, fp32 and bf16."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _batched(query), _batched(key), _batched(value), 0.0, causal, scale=scale
        )
        return _flat(output), logsumexp.squeeze(0)

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
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _batched(output_grad),
            _batched(query),
            _batched(key),
            _batched(value),
            _batched(output),
            logsumexp.unsqueeze(0),
            0.0,
            causal,
            scale=scale,
        )
        query_grad, key_grad, value_grad = (_flat(gradient) for gradient in gradients)
        return query_grad, key_grad, value_grad


class MathKernel(BlockByBlock):
    """Plain matrix products, the scores in memory: for small fp32 runs on GPUs."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        groups = query.shape[1] // key.shape[1]
        scores = self._scores(query, _repeated(key, groups), causal=causal, scale=scale)
        output = torch.einsum("hqk,khd->qhd", scores.softmax(-1), _repeated(value, groups).float())
        return output.to(query.dtype), scores.logsumexp(-1)

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
        groups = query.shape[1] // key.shape[1]
        keys, values = _repeated(key, groups).float(), _repeated(value, groups).float()
        grad, queries = output_grad.float(), query.float()
        weights = (
            self._scores(query, keys, causal=causal, scale=scale) - logsumexp.unsqueeze(-1)
        ).exp()
        value_grad = torch.einsum("hqk,qhd->khd", weights, grad)
        weight_grad = torch.einsum("qhd,khd->hqk", grad, values)
        delta = (grad * output.float()).sum(-1).T.unsqueeze(-1)
        score_grad = weights * (weight_grad - delta) * scale
        query_grad = torch.einsum("hqk,khd->qhd", score_grad, keys)
        key_grad = torch.einsum("hqk,qhd->khd", score_grad, queries)
        return (
            query_grad.to(query.dtype),
            _summed(key_grad, groups).to(key.dtype),
            _summed(value_grad, groups).to(value.dtype),
        )

    @staticmethod
    def _scores(query: Tensor, key: Tensor, *, causal: bool, scale: float) -> Tensor:
        scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * scale
        if causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return scores


def padded(tensor: Tensor, length: int) -> Tensor:
    """[t,X,D] -> [length,X,D], zeros behind; the tensor itself where nothing is missing."""
    missing = length - len(tensor)
    return F.pad(tensor, (0, 0, 0, 0, 0, missing)) if missing else tensor


def _consecutive(lengths: tuple[int, ...]) -> list[slice]:
    ends = [0, *itertools.accumulate(lengths)]
    return [slice(*span) for span in itertools.pairwise(ends)]


def _batched(tensor: Tensor) -> Tensor:
    """[t,H,D] -> [1,H,t,D], a view."""
    return tensor.transpose(0, 1).unsqueeze(0)


def _flat(tensor: Tensor) -> Tensor:
    """[1,H,t,D] -> [t,H,D], a view."""
    return tensor.squeeze(0).transpose(0, 1)


def _repeated(tensor: Tensor, groups: int) -> Tensor:
    """[t,G,D] -> [t,H,D]: every key/value head for each of its query heads."""
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def _summed(gradient: Tensor, groups: int) -> Tensor:
    """[t,H,D] -> [t,G,D]: the gradient of `_repeated`."""
    return gradient if groups == 1 else gradient.unflatten(1, (-1, groups)).sum(2)
