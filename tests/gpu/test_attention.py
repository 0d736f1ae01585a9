"""Every kernel of this GPU, in bf16, against a softmax in fp32: blocks and whole trees."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megatron_longpo.data.trees.forest import NO_PARENT
from megatron_longpo.errors import UserError
from megatron_longpo.model.attention.blocks import one_block
from megatron_longpo.model.attention.kernel_choice import choose_kernel
from megatron_longpo.model.attention.kernels import AttentionKernel, MathKernel
from megatron_longpo.model.attention.long_blocks import (
    SHORTEST_LONG_BLOCK,
    LongBlockKernel,
    rounded,
)
from megatron_longpo.model.attention.tree_attention import attend, attend_backward
from megatron_longpo.parallel.layout import TokenLayout, lay_out
from tests.model.attention.dense_attention import block_mask, dense_attention, dense_gradients
from tests.model.attention.test_tree_attention import make_forest, tree_mask

pytestmark = pytest.mark.gpu

TOLERANCE = 5e-3
"""Norm of the difference over the norm."""
KERNELS = ("fa4", "te", "cudnn", "flash_attn", "varlen", "sdpa", "cudnn+te", "cudnn+te, all long")
BLOCKS = [
    # queries, keys, heads, key/value heads, head size, causal
    (2100, 2100, 4, 2, 128, True),
    (1, 1, 4, 2, 64, True),
    (7, 7, 4, 4, 64, True),
    (300, 300, 8, 2, 128, True),
    (1000, 1000, 4, 1, 64, True),
    (5, 700, 8, 2, 128, False),
    (200, 1500, 8, 2, 128, False),
    (129, 131, 6, 3, 64, False),
]


def kernel_of(setting: str, head_dim: int) -> AttentionKernel:
    """The kernel, or a skip that says why this machine has none."""
    device = torch.device("cuda", torch.cuda.current_device())
    name, _, is_all_long = setting.partition(", ")
    try:
        kernel = choose_kernel(name, device=device, dtype=torch.bfloat16, head_dim=head_dim).kernel
    except UserError as error:
        pytest.skip(str(error))
    if not is_all_long:
        return kernel
    # So that small blocks are rounded too, and by much: 300 tokens to 320, 1,000 to 1,024.
    assert isinstance(kernel, LongBlockKernel)
    return LongBlockKernel(long=kernel.long, other=kernel.other, shortest=256, steps=8)


def random_tensors(lengths_and_heads: Sequence[tuple[int, int]], head_dim: int) -> list[Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(lengths_and_heads[0][0])
    return [
        torch.randn(
            length, heads, head_dim, generator=generator, device="cuda", dtype=torch.bfloat16
        )
        for length, heads in lengths_and_heads
    ]


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    assert error <= TOLERANCE, f"{what}: off by {error:.3g}"


@pytest.mark.parametrize("setting", KERNELS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_is_softmax_attention(
    setting: str, block: tuple[int, int, int, int, int, bool]
) -> None:
    queries, keys, heads, groups, head_dim, causal = block
    kernel, scale = kernel_of(setting, head_dim), head_dim**-0.5
    *inputs, grad = random_tensors(
        [(queries, heads), (keys, groups), (keys, groups), (queries, heads)], head_dim
    )
    exact = [tensor.float() for tensor in inputs]
    mask = block_mask(queries, keys, causal=causal).cuda()
    expected, expected_logsumexp = dense_attention(exact, mask, scale)
    expected_grads = dense_gradients(exact, mask, scale, grad.float())
    query, key, value = inputs
    attention = one_block(query, key, value, causal=causal, scale=scale)
    attended = kernel.forward(attention)
    output, logsumexp = attended
    assert output.dtype == torch.bfloat16 and logsumexp.dtype == torch.float32
    assert_close(output, expected, "output")
    torch.testing.assert_close(logsumexp, expected_logsumexp, rtol=TOLERANCE, atol=TOLERANCE)
    grads = kernel.backward(attention, attended, grad)
    for name, actual, wanted in zip("qkv", grads, expected_grads, strict=True):
        if queries == 1 and causal and name in "qk":
            # One key: the softmax is 1 whatever its score, and the true gradient is 0.
            assert float(actual.abs().max()) < 1e-2
            continue
        assert_close(actual, wanted, f"gradient of {name}")


@pytest.mark.parametrize("head_dim", [64, 80, 96, 256])
def test_flash_attention_4_is_right_or_refused(head_dim: int) -> None:
    """Version 4.0.0b36 gives wrong gradients of queries for heads of 80."""
    tokens, scale = 1000, head_dim**-0.5
    kernel = kernel_of("fa4", head_dim)
    heads = (4, 2, 2, 4)
    query, key, value, grad = random_tensors([(tokens, count) for count in heads], head_dim)
    block, exact = (
        one_block(*tensors, causal=True, scale=scale)
        for tensors in ((query, key, value), (query.float(), key.float(), value.float()))
    )
    expected = MathKernel().forward(exact)
    wanted = MathKernel().backward(exact, expected, grad.float())
    for actual, of in zip(kernel.backward(block, kernel.forward(block), grad), wanted, strict=True):
        assert_close(actual, of, f"gradient at a head size of {head_dim}")


@pytest.mark.parametrize("is_followed", [False, True], ids=["alone", "followed"])
def test_a_long_block_at_its_rounded_length_is_softmax_attention(is_followed: bool) -> None:
    """At a length that training would round, with other rows behind it in memory or none."""
    tokens, heads, groups, head_dim = SHORTEST_LONG_BLOCK + 40, 2, 1, 128
    kernel, scale = kernel_of("cudnn+te", head_dim), head_dim**-0.5
    assert rounded(tokens) == tokens + 24
    rows = slice(64, 64 + tokens)
    tensors = [
        tensor[rows] if is_followed else tensor[rows].clone()
        for tensor in random_tensors(
            [(tokens + 5064, count) for count in (heads, groups, groups, heads)], head_dim
        )
    ]
    *inputs, grad = tensors
    block, exact = (
        one_block(query, key, value, causal=True, scale=scale)
        for query, key, value in (inputs, [tensor.float() for tensor in inputs])
    )
    attended = kernel.forward(block)
    grads = kernel.backward(block, attended, grad)
    expected = MathKernel().forward(exact)
    expected_grads = MathKernel().backward(exact, expected, grad.float())
    assert_close(attended.output, expected.output, "output")
    torch.testing.assert_close(
        attended.logsumexp, expected.logsumexp, rtol=TOLERANCE, atol=TOLERANCE
    )
    for name, actual, wanted in zip("qkv", grads, expected_grads, strict=True):
        assert_close(actual, wanted, f"gradient of {name}")


def test_lengths_near_each_other_have_one_plan() -> None:
    """A new length within a step of a known one costs a call, not a plan."""
    kernel, scale = kernel_of("cudnn+te", 128), 128**-0.5

    def seconds(tokens: int) -> float:
        *inputs, grad = random_tensors([(tokens, 2), (tokens, 1), (tokens, 1), (tokens, 2)], 128)
        torch.cuda.synchronize()
        started = time.perf_counter()
        query, key, value = inputs
        block = one_block(query, key, value, causal=True, scale=scale)
        kernel.backward(block, kernel.forward(block), grad)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    known = 30_080
    assert rounded(known - 20) == known == rounded(known)
    seconds(known)
    assert seconds(known - 20) < 0.05 < seconds(known + 1)


@pytest.mark.parametrize("setting", KERNELS)
@pytest.mark.parametrize(
    ("parents", "lengths"),
    [
        ([NO_PARENT], [500]),
        ([NO_PARENT, 0, 0], [900, 150, 200]),
        ([NO_PARENT, 0, 1, 0, NO_PARENT, 4], [300, 170, 140, 260, 400, 3]),
        # More blocks than Transformer Engine's smallest plan is for, 32.
        ([NO_PARENT, *[0] * 40], [400, *[17] * 40]),
    ],
    ids=["row", "pair", "forest", "brush"],
)
def test_a_tree_is_its_dense_mask(setting: str, parents: list[int], lengths: list[int]) -> None:
    heads, groups, head_dim = 8, 2, 128
    kernel, scale = kernel_of(setting, head_dim), head_dim**-0.5
    forest = make_forest(parents, lengths)
    tokens = lay_out(forest, multiple=8, device=torch.device("cuda"))
    num_tokens = tokens.num_tokens
    query, key, value, grad = random_tensors(
        [(num_tokens, heads), (num_tokens, groups), (num_tokens, groups), (num_tokens, heads)],
        head_dim,
    )
    exact = [tensor.float() for tensor in (query, key, value)]
    mask = tree_mask(forest, num_tokens).cuda()
    entered = (query, key, value)
    output, logsumexp = attend(entered, tokens.attention, kernel, scale=scale)
    assert_close(output, dense_attention(exact, mask, scale)[0], "output")
    grads = attend_backward(grad, entered, output, logsumexp, tokens.attention, kernel, scale=scale)
    expected = dense_gradients(exact, mask, scale, grad.float())
    for name, actual, wanted in zip("qkv", grads, expected, strict=True):
        assert_close(actual, wanted, f"gradient of {name}")


def test_ranks_with_gathered_keys_make_up_the_whole() -> None:
    """Merged blocks of two ranks, each with its zigzag of every segment, on one GPU."""
    heads, groups, head_dim = 8, 2, 128
    kernel, scale = kernel_of("auto", head_dim), head_dim**-0.5
    forest = make_forest([NO_PARENT, 0, 0], [1200, 260, 300])
    total = forest.num_tokens
    query, key, value, grad = random_tensors(
        [(total, heads), (total, groups), (total, groups), (total, heads)], head_dim
    )
    whole = lay_out(forest, device=torch.device("cuda")).attention
    exact = tuple(tensor.float() for tensor in (query, key, value))
    expected, expected_logsumexp = attend(exact, whole, MathKernel(), scale=scale)
    expected_grads = attend_backward(
        grad.float(), exact, expected, expected_logsumexp, whole, MathKernel(), scale=scale
    )
    key_grads, value_grads = torch.zeros_like(exact[1]), torch.zeros_like(exact[2])
    for rank in range(2):
        plan = lay_out(
            forest, device=torch.device("cuda"), context_rank=rank, context_size=2
        ).attention
        here = TokenLayout.of(forest, num_ranks=2, multiple=1).tokens(rank)
        entered = (query[here], key, value)
        output, logsumexp = attend(entered, plan, kernel, scale=scale)
        assert_close(output, expected[here], "output")
        query_grad, key_grad, value_grad = attend_backward(
            grad[here], entered, output, logsumexp, plan, kernel, scale=scale
        )
        assert_close(query_grad, expected_grads[0][here], "gradient of q")
        key_grads += key_grad
        value_grads += value_grad
    assert_close(key_grads, expected_grads[1], "gradient of k")
    assert_close(value_grads, expected_grads[2], "gradient of v")
