"""Every kernel of CPUs equals a softmax over the whole score matrix; tests/gpu has the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_longpo.model.attention.blocks import Attended, one_block
from megatron_longpo.model.attention.kernels import AttentionKernel, CpuFlashKernel, MathKernel
from tests.model.attention.dense_attention import block_mask, dense_attention, dense_gradients

SCALE = 0.3
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
SHAPES = [
    # queries, keys, heads, key/value heads, head size, causal
    (1, 1, 2, 1, 8, True),
    (7, 7, 4, 2, 8, True),
    (65, 65, 3, 3, 16, True),
    (5, 70, 4, 1, 8, False),
    (33, 2, 4, 2, 24, False),
]


def random_block(
    queries: int, keys: int, heads: int, groups: int, head_dim: int, *, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Query, key, value and the gradient of the output, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    shapes = [(queries, heads), (keys, groups), (keys, groups), (queries, heads)]
    *inputs, grad = [
        torch.randn(*shape, head_dim, generator=generator, dtype=torch.float64).to(dtype)
        for shape in shapes
    ]
    return inputs, grad


def check_kernel(
    kernel: AttentionKernel, inputs: list[Tensor], grad: Tensor, *, causal: bool, tolerance: float
) -> None:
    """`inputs` and `grad` may be on any device; the truth is computed from them in fp64."""
    query, key, value = inputs
    exact = [tensor.cpu().double() for tensor in inputs]
    mask = block_mask(len(query), len(key), causal=causal)
    expected, expected_logsumexp = dense_attention(exact, mask, SCALE)
    expected_grads = dense_gradients(exact, mask, SCALE, grad.cpu().double())

    block = one_block(query, key, value, causal=causal, scale=SCALE)
    attended = kernel.forward(block)
    output, logsumexp = attended
    assert output.dtype == inputs[0].dtype and output.shape == inputs[0].shape
    assert logsumexp.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(output.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        logsumexp.cpu().double(), expected_logsumexp, rtol=tolerance, atol=tolerance
    )
    grads = kernel.backward(block, attended, grad)
    for actual, expected_grad, of in zip(grads, expected_grads, inputs, strict=True):
        assert actual.dtype == of.dtype and actual.shape == of.shape
        room = tolerance * max(1.0, float(expected_grad.abs().max()))
        torch.testing.assert_close(actual.cpu().double(), expected_grad, rtol=tolerance, atol=room)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [CpuFlashKernel(), MathKernel()], ids=["flash", "math"])
def test_kernel_is_softmax_attention(
    kernel: AttentionKernel, dtype: torch.dtype, shape: tuple[Any, ...]
) -> None:
    if isinstance(kernel, MathKernel) and dtype == torch.float64:
        pytest.skip("computes in fp32")
    *sizes, causal = shape
    inputs, grad = random_block(*sizes, dtype=dtype)
    check_kernel(kernel, inputs, grad, causal=causal, tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("kernel", [CpuFlashKernel(), MathKernel()], ids=["flash", "math"])
def test_tensors_may_be_slices_of_larger_ones(kernel: AttentionKernel) -> None:
    """Megatron hands out views of one fused q/k/v tensor."""
    fused = torch.randn(9, 2, 4 * 8, generator=torch.Generator().manual_seed(0))
    query, key, value = fused[..., :16].reshape(9, 4, 8), fused[..., 16:24], fused[..., 24:]
    strided = [query[2:], key[2:], value[2:]]
    assert not strided[1].is_contiguous()
    grad = torch.ones_like(strided[0])
    check_kernel(kernel, strided, grad, causal=True, tolerance=2e-6)


@pytest.mark.parametrize("kernel", [CpuFlashKernel(), MathKernel()], ids=["flash", "math"])
def test_steep_scores_stay_finite(kernel: AttentionKernel) -> None:
    (query, key, value), grad = random_block(6, 6, 2, 2, 8, dtype=torch.float32)
    query, key = 100 * query, 100 * key
    block = one_block(query, key, value, causal=True, scale=SCALE)
    attended = kernel.forward(block)
    grads = kernel.backward(block, attended, grad)
    for tensor in (*attended, *grads):
        assert torch.isfinite(tensor).all()


def test_one_blocks_gradient_is_its_share_of_the_whole() -> None:
    """With output and log-sum-exp over all keys, each block's gradients are those of the whole."""
    (query, key, value), grad = random_block(4, 11, 4, 2, 8, dtype=torch.float64)
    mask = block_mask(4, 11, causal=False)
    attended = Attended(*dense_attention([query, key, value], mask, SCALE))
    expected = dense_gradients([query, key, value], mask, SCALE, grad)
    kernel, whole_query_grad = CpuFlashKernel(), torch.zeros_like(query)
    for keys in (slice(0, 3), slice(3, 11)):
        block = one_block(query, key[keys], value[keys], causal=False, scale=SCALE)
        query_grad, key_grad, value_grad = kernel.backward(block, attended, grad)
        whole_query_grad += query_grad
        torch.testing.assert_close(key_grad, expected[1][keys])
        torch.testing.assert_close(value_grad, expected[2][keys])
    torch.testing.assert_close(whole_query_grad, expected[0])
