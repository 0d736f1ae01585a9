"""Attention kernels: queries against keys, forward and backward, and the kernels of CPUs.

A kernel returns the log-sum-exp of its scores beside its output, so that results over different
keys can be merged exactly. Its backward takes the merged output and log-sum-exp, which makes each
block's gradients those of the whole (Milakov and Gimelshein 2018; Dao 2023). The kernels of GPUs
are in gpu_kernels.py and te_kernel.py; kernel_choice.py chooses.

Letters as in blocks.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_longpo.model.attention.blocks import Attended, Block, Gradients


class AttentionKernel(Protocol):
    """Attention of one or several blocks."""

    def forward(self, block: Block) -> Attended:
        """Returns output and log-sum-exp."""
        ...

    def backward(self, block: Block, attended: Attended, output_grad: Tensor) -> Gradients:
        """Returns the gradients of query, key and value.

        Args:
            block: as in forward.
            attended: output and log-sum-exp over all keys, of other blocks too.
            output_grad: [q,H,D].
        """
        ...


class BlockByBlock(ABC):
    """A kernel that takes one block a call, in its `forward_one` and `backward_one`."""

    @abstractmethod
    def forward_one(self, block: Block) -> Attended:
        """Returns `AttentionKernel.forward` of a single block."""

    @abstractmethod
    def backward_one(self, block: Block, attended: Attended, output_grad: Tensor) -> Gradients:
        """Returns `AttentionKernel.backward` of a single block."""

    def forward(self, block: Block) -> Attended:
        """Returns output and log-sum-exp, by one call for every block."""
        if block.is_one:
            return self.forward_one(block)
        query = block.query
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        logsumexp = torch.empty(
            query.shape[1],
            query.shape[0],
            dtype=torch.promote_types(query.dtype, torch.float32),
            device=query.device,
        )
        for queries, _, part in block.each():
            output[queries], logsumexp[:, queries] = self.forward_one(part)
        return Attended(output, logsumexp)

    def backward(self, block: Block, attended: Attended, output_grad: Tensor) -> Gradients:
        """Returns the gradients of query, key and value, by one call for every block."""
        if block.is_one:
            return self.backward_one(block, attended, output_grad)
        query_grad, key_grad, value_grad = (
            torch.empty_like(tensor, memory_format=torch.contiguous_format)
            for tensor in (block.query, block.key, block.value)
        )
        for queries, keys, part in block.each():
            query_grad[queries], key_grad[keys], value_grad[keys] = self.backward_one(
                part, attended.rows(queries), output_grad[queries]
            )
        return query_grad, key_grad, value_grad


class CpuFlashKernel(BlockByBlock):
    """The flash kernel behind `scaled_dot_product_attention` on CPUs; fp64, fp32 and bf16."""

    def forward_one(self, block: Block) -> Attended:
        """Returns output and log-sum-exp of one block."""
        output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _batched(block.query),
            _batched(block.key),
            _batched(block.value),
            0.0,
            block.causal,
            scale=block.scale,
        )
        return Attended(_flat(output), logsumexp.squeeze(0))

    def backward_one(self, block: Block, attended: Attended, output_grad: Tensor) -> Gradients:
        """Returns the gradients of one block."""
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _batched(output_grad),
            _batched(block.query),
            _batched(block.key),
            _batched(block.value),
            _batched(attended.output),
            attended.logsumexp.unsqueeze(0),
            0.0,
            block.causal,
            scale=block.scale,
        )
        query_grad, key_grad, value_grad = (_flat(gradient) for gradient in gradients)
        return query_grad, key_grad, value_grad


class MathKernel(BlockByBlock):
    """Plain matrix products with all scores in memory, for small fp32 runs on GPUs."""

    def forward_one(self, block: Block) -> Attended:
        """Returns output and log-sum-exp of one block."""
        scores = _scores(block)
        values = _repeated(block.value, block).float()
        output = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        return Attended(output.to(block.query.dtype), scores.logsumexp(-1))

    def backward_one(self, block: Block, attended: Attended, output_grad: Tensor) -> Gradients:
        """Returns the gradients of one block."""
        keys, values = _repeated(block.key, block).float(), _repeated(block.value, block).float()
        grad, queries = output_grad.float(), block.query.float()
        weights = (_scores(block) - attended.logsumexp.unsqueeze(-1)).exp()
        value_grad = torch.einsum("hqk,qhd->khd", weights, grad)
        weight_grad = torch.einsum("qhd,khd->hqk", grad, values)
        delta = (grad * attended.output.float()).sum(-1).T.unsqueeze(-1)
        score_grad = weights * (weight_grad - delta) * block.scale
        query_grad = torch.einsum("hqk,khd->qhd", score_grad, keys)
        key_grad = torch.einsum("hqk,qhd->khd", score_grad, queries)
        return (
            query_grad.to(block.query.dtype),
            _summed(key_grad, block).to(block.key.dtype),
            _summed(value_grad, block).to(block.value.dtype),
        )


def padded(tensor: Tensor, length: int) -> Tensor:
    """Returns `tensor` [t,X,D] with zeros behind it, [length,X,D]; itself if it is long enough."""
    missing = length - len(tensor)
    return F.pad(tensor, (0, 0, 0, 0, 0, missing)) if missing else tensor


def _scores(block: Block) -> Tensor:
    """Returns [H,q,k] in fp32; -inf where a query does not attend a key."""
    keys = _repeated(block.key, block).float()
    scores = torch.einsum("qhd,khd->hqk", block.query.float(), keys) * block.scale
    if block.causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores


def _batched(tensor: Tensor) -> Tensor:
    """[t,H,D] -> [1,H,t,D], a view."""
    return tensor.transpose(0, 1).unsqueeze(0)


def _flat(tensor: Tensor) -> Tensor:
    """[1,H,t,D] -> [t,H,D], a view."""
    return tensor.squeeze(0).transpose(0, 1)


def _groups(block: Block) -> int:
    """Returns the number of query heads of a key/value head."""
    return block.query.shape[1] // block.key.shape[1]


def _repeated(tensor: Tensor, block: Block) -> Tensor:
    """[t,G,D] -> [t,H,D]: repeats every key/value head for each of its query heads."""
    groups = _groups(block)
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def _summed(gradient: Tensor, block: Block) -> Tensor:
    """[t,H,D] -> [t,G,D]: the gradient of `_repeated`."""
    groups = _groups(block)
    return gradient if groups == 1 else gradient.unflatten(1, (-1, groups)).sum(2)
