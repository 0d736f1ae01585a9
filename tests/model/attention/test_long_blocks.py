"""Rounded lengths change no result, stay near the true ones, and are few."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_longpo.data.trees.forest import NO_PARENT
from megatron_longpo.model.attention.blocks import Attended, Block, one_block
from megatron_longpo.model.attention.kernels import AttentionKernel, CpuFlashKernel, MathKernel
from megatron_longpo.model.attention.long_blocks import (
    SHORTEST_LONG_BLOCK,
    LongBlockKernel,
    rounded,
)
from megatron_longpo.model.attention.tree_attention import attend, attend_backward
from megatron_longpo.parallel.layout import lay_out
from tests.model.attention.dense_attention import dense_attention, dense_gradients
from tests.model.attention.test_kernels import check_kernel, random_block
from tests.model.attention.test_tree_attention import make_forest, tree_mask


class WatchedKernel(CpuFlashKernel):
    """Keeps the queries of its calls."""

    def __init__(self) -> None:
        self.queries: list[Tensor] = []

    def forward(self, block: Block) -> Attended:
        self.queries.append(block.query)
        return super().forward(block)


def by_length(long: AttentionKernel, other: AttentionKernel) -> LongBlockKernel:
    """Long is 32 and more; those are rounded up to multiples of 8, of 16 from 64 on."""
    return LongBlockKernel(long=long, other=other, shortest=32, steps=4)


def test_lengths_are_rounded_by_little_to_few() -> None:
    lengths = range(SHORTEST_LONG_BLOCK, 2 * SHORTEST_LONG_BLOCK)
    for octave in range(5):
        longest = 2 ** (octave + 1) * SHORTEST_LONG_BLOCK
        assert rounded(longest) == longest
        plans = {rounded(2**octave * length + 1) for length in lengths}
        assert len(plans) == 400
    for length in (25_601, 32_768, 33_000, 102_401, 131_072, 131_073, 262_759, 524_289):
        assert length <= rounded(length) and (rounded(length) / length) ** 2 < 1.005
        assert rounded(rounded(length)) == rounded(length), "rounding is done once"
    assert [rounded(length) for length in (32_705, 131_000)] == [32_768, 131_072]


@pytest.mark.parametrize("kernel", [CpuFlashKernel(), MathKernel()], ids=["flash", "math"])
@pytest.mark.parametrize("length", [32, 33, 41, 70])
@pytest.mark.parametrize("is_followed", [False, True], ids=["alone", "followed"])
def test_a_rounded_block_is_softmax_attention(
    kernel: AttentionKernel, length: int, is_followed: bool
) -> None:
    """With other rows behind it in memory, whose values would show, or with none."""
    dtype = torch.float32
    inputs, grad = random_block(100, 100, 4, 2, 8, dtype=dtype)
    inputs, grad = [tensor * 3 for tensor in inputs], grad * 3
    rows = [tensor[5 : 5 + length] for tensor in (*inputs, grad)]
    if not is_followed:
        rows = [tensor.clone() for tensor in rows]
    *inputs, grad = rows
    check_kernel(by_length(kernel, kernel), inputs, grad, causal=True, tolerance=1e-5)


def test_rows_that_follow_are_used_where_they_lie() -> None:
    long, other = WatchedKernel(), WatchedKernel()
    kernel = by_length(long, other)
    (query, key, value), _ = random_block(100, 100, 2, 2, 8, dtype=torch.float32)

    def forward(queries: slice, keys: slice, *, causal: bool) -> None:
        kernel.forward(one_block(query[queries], key[keys], value[keys], causal=causal, scale=1.0))

    forward(slice(10, 51), slice(10, 51), causal=True)
    forward(slice(59, 100), slice(59, 100), causal=True)
    forward(slice(0, 31), slice(0, 31), causal=True)
    forward(slice(0, 60), slice(0, 41), causal=False)
    in_place, copied = long.queries
    assert len(in_place) == len(copied) == 48
    assert in_place.data_ptr() == query[10:].data_ptr() and not copied[41:].any()
    assert [len(queries) for queries in other.queries] == [31, 60]


@pytest.mark.parametrize(
    ("parents", "lengths"),
    [
        ([NO_PARENT], [45]),
        ([NO_PARENT, 0, 0], [40, 5, 50]),
        ([NO_PARENT, 0, NO_PARENT], [9, 2, 61]),
    ],
    ids=["row", "pair", "two rows"],
)
def test_a_tree_of_rounded_blocks_is_its_dense_mask(parents: list[int], lengths: list[int]) -> None:
    forest = make_forest(parents, lengths)
    tokens = lay_out(forest, device=torch.device("cpu"), multiple=4)
    num_tokens = tokens.num_tokens
    (query, key, value), grad = random_block(num_tokens, num_tokens, 4, 2, 8, dtype=torch.float64)
    long = WatchedKernel()
    kernel, scale = by_length(long, CpuFlashKernel()), 0.3
    entered = (query, key, value)
    mask = tree_mask(forest, num_tokens)
    output, logsumexp = attend(entered, tokens.attention, kernel, scale=scale)
    expected, _ = dense_attention(entered, mask, scale)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-11)
    grads = attend_backward(grad, entered, output, logsumexp, tokens.attention, kernel, scale=scale)
    expected_grads = dense_gradients(entered, mask, scale, grad)
    for actual, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-11)
    assert long.queries and all(len(queries) % 8 == 0 for queries in long.queries)
