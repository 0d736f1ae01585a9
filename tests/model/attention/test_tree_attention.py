"""Attention over random forests equals a dense mask built token by token from the parents."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_longpo.data.trees.forest import NO_PARENT, Forest
from megatron_longpo.model.attention.blocks import Attended, Block, Gradients
from megatron_longpo.model.attention.kernels import CpuFlashKernel
from megatron_longpo.model.attention.tree_attention import TreeAttention, attend, attend_backward
from megatron_longpo.parallel.context import NoExchange
from megatron_longpo.parallel.layout import TokenLayout, lay_out
from tests.data.trees.forests import check_layout
from tests.model.attention.dense_attention import dense_attention, dense_gradients
from tests.operators import Operators

quick = settings(max_examples=80, deadline=None, derandomize=True)

CPU = torch.device("cpu")
HEADS, GROUPS, HEAD_DIM = 4, 2, 8


def make_forest(parents: list[int], lengths: list[int]) -> Forest:
    """A forest without edges, from the two columns that attention depends on."""
    starts = np.cumsum([0, *lengths])[:-1]
    ends_of_rows: list[int] = []
    positions = []
    for parent, length in zip(parents, lengths, strict=True):
        begin = 0 if parent == NO_PARENT else ends_of_rows[parent]
        positions.append(np.arange(begin, begin + length))
        ends_of_rows.append(begin + length)
    nothing = np.empty(0, dtype=np.int64)
    return Forest(
        input_ids=np.zeros(sum(lengths), dtype=np.int64),
        position_ids=np.concatenate(positions),
        segment_starts=starts.astype(np.int64),
        segment_lengths=np.array(lengths, dtype=np.int64),
        segment_parents=np.array(parents, dtype=np.int64),
        edge_sources=nothing,
        edge_targets=nothing,
        edge_pairs=nothing,
        edge_turns=nothing,
        edge_terms=nothing,
    )


@st.composite
def forests(draw: st.DrawFn) -> Forest:
    """Several roots and any depth: a segment hangs on any segment of the chain before it."""
    parents: list[int] = []
    for segment in range(draw(st.integers(1, 9))):
        chain = [NO_PARENT]
        ancestor = segment - 1
        while ancestor != NO_PARENT:
            chain.append(ancestor)
            ancestor = parents[ancestor]
        parents.append(draw(st.sampled_from(chain)))
    lengths = draw(st.lists(st.integers(1, 5), min_size=len(parents), max_size=len(parents)))
    return make_forest(parents, lengths)


def tree_mask(forest: Forest, num_tokens: int) -> Tensor:
    """[t,t] bool: who attends whom, by walking from each segment to its root."""
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    starts, lengths = forest.segment_starts.tolist(), forest.segment_lengths.tolist()
    for start, length, parent in zip(starts, lengths, forest.segment_parents.tolist(), strict=True):
        queries = slice(start, start + length)
        mask[queries, queries] = torch.ones(length, length, dtype=torch.bool).tril()
        while parent != NO_PARENT:
            mask[queries, starts[parent] : starts[parent] + lengths[parent]] = True
            parent = int(forest.segment_parents[parent])
    return mask


def tree_attention(kernel: Any = None, **settings: Any) -> TreeAttention:
    return TreeAttention(
        kernel=kernel or CpuFlashKernel(),
        exchange=NoExchange(),
        config=SimpleNamespace(kv_channels=HEAD_DIM),
        layer_number=1,
        **settings,
    )


def random_inputs(num_tokens: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Query, key, value as Megatron hands them over, [t,1,heads,D], and an output gradient."""
    generator = torch.Generator().manual_seed(num_tokens)
    *inputs, grad = [
        torch.randn(num_tokens, heads, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype)
        for heads in (HEADS, GROUPS, GROUPS, HEADS)
    ]
    return [tensor.unsqueeze(1) for tensor in inputs], grad


@quick
@given(forests(), st.sampled_from([1, 4]))
def test_every_forest_is_its_dense_mask(forest: Forest, multiple: int) -> None:
    check_layout(forest)
    tokens = lay_out(forest, multiple=multiple, device=CPU)
    inputs, grad = random_inputs(tokens.num_tokens, torch.float64)
    mask = tree_mask(forest, tokens.num_tokens)
    scale = HEAD_DIM**-0.5
    flat = [tensor.squeeze(1) for tensor in inputs]
    expected, _ = dense_attention(flat, mask, scale)
    expected_grads = dense_gradients(flat, mask, scale, grad)

    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = tree_attention()(*leaves, packed_seq_params=tokens.attention)
    assert output.shape == (tokens.num_tokens, 1, HEADS * HEAD_DIM)
    torch.testing.assert_close(output.reshape(expected.shape), expected, rtol=1e-11, atol=1e-11)
    grads = torch.autograd.grad(output, leaves, grad.reshape(output.shape))
    for actual, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(actual.squeeze(1), wanted, rtol=1e-10, atol=1e-11)

    padding = slice(forest.num_tokens, None)
    assert output[padding].eq(0).all()
    assert all(gradient[padding].eq(0).all() for gradient in grads)


class CountingKernel(CpuFlashKernel):
    """Counts its forward calls."""

    calls = 0

    def forward(self, block: Block) -> Attended:
        self.calls += 1
        return super().forward(block)


@pytest.mark.parametrize("keeps_results", [False, True])
def test_recomputed_layers_get_kept_results(keeps_results: bool) -> None:
    """Two microbatches in flight, backward in the other order, as Megatron's checkpoints run."""
    kernel = CountingKernel()
    attention = tree_attention(kernel, keeps_results=keeps_results)
    plans = [
        lay_out(make_forest(parents, lengths), device=CPU).attention
        for parents, lengths in (([NO_PARENT, 0, 0], [9, 3, 4]), ([NO_PARENT, 0], [11, 5]))
    ]
    inputs, grad = random_inputs(16, torch.float64)
    with torch.no_grad():
        first = [attention(*inputs, packed_seq_params=plan) for plan in plans]
    calls_of_first = kernel.calls
    for plan, wanted in reversed(list(zip(plans, first, strict=True))):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        again = attention(*leaves, packed_seq_params=plan)
        torch.testing.assert_close(again, wanted, rtol=0, atol=0)
        fresh = tree_attention()(*leaves, packed_seq_params=plan)
        for actual, expected in zip(
            torch.autograd.grad(again, leaves, grad.reshape(again.shape)),
            torch.autograd.grad(fresh, leaves, grad.reshape(again.shape)),
            strict=True,
        ):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert kernel.calls == calls_of_first * (1 if keeps_results else 2)
    attention.eval()
    with torch.no_grad():
        attention(*inputs, packed_seq_params=plans[0])
    assert not attention._kept, "nothing is left of a step, nor kept of an evaluation"


@settings(quick, max_examples=30)
@given(forests(), st.sampled_from([(2, 1), (3, 1), (4, 1), (4, 2), (8, 2), (8, 4), (8, 8)]))
def test_ranks_with_gathered_keys_make_up_the_whole(forest: Forest, ranks: tuple[int, int]) -> None:
    """Queries of each rank, or of each group that scatters heads, over all keys; key gradients add
    up over them. What a rank of a group does for its heads is done here for all heads at once."""
    num_ranks, inner = ranks
    (query, key, value), grad = random_inputs(forest.num_tokens, torch.float64)
    flat = [tensor.squeeze(1) for tensor in (query, key, value)]
    mask, scale = tree_mask(forest, forest.num_tokens), HEAD_DIM**-0.5
    expected, _ = dense_attention(flat, mask, scale)
    expected_grads = dense_gradients(flat, mask, scale, grad)
    layout = TokenLayout.of(forest, num_ranks=num_ranks, multiple=1)
    key_grads, value_grads = torch.zeros_like(flat[1]), torch.zeros_like(flat[2])
    for rank in range(0, num_ranks, inner):
        group = range(rank, rank + inner)
        here = np.sort(np.concatenate([layout.tokens(member) for member in group]))
        plan = lay_out(
            forest,
            device=CPU,
            context_rank=rank,
            context_size=num_ranks,
            context_inner=inner,
        ).attention
        entered = (flat[0][here], flat[1], flat[2])
        output, logsumexp = attend(entered, plan, CpuFlashKernel(), scale=scale)
        torch.testing.assert_close(output, expected[here], rtol=1e-11, atol=1e-11)
        query_grad, key_grad, value_grad = attend_backward(
            grad[here], entered, output, logsumexp, plan, CpuFlashKernel(), scale=scale
        )
        torch.testing.assert_close(query_grad, expected_grads[0][here], rtol=1e-10, atol=1e-11)
        key_grads += key_grad
        value_grads += value_grad
    torch.testing.assert_close(key_grads, expected_grads[1], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(value_grads, expected_grads[2], rtol=1e-10, atol=1e-11)


class UnseenKernel(CpuFlashKernel):
    """Takes many blocks at once, for nothing; its own operators are not counted."""

    def __init__(self, seen: Operators) -> None:
        self.seen = seen
        self.calls = 0

    def forward(self, block: Block) -> Attended:
        before = len(self.seen.names)
        result = self.forward_one(block)
        self._forget(before)
        return result

    def backward(self, block: Block, attended: Attended, output_grad: Tensor) -> Gradients:
        before = len(self.seen.names)
        result = self.backward_one(block, attended, output_grad)
        self._forget(before)
        return result

    def _forget(self, before: int) -> None:
        del self.seen.names[before:]
        self.calls += 1


@pytest.mark.parametrize(
    ("parents", "contexts"), [([NO_PARENT], 0), ([NO_PARENT, 0, 0], 1), ([NO_PARENT, 0, 0] * 2, 2)]
)
def test_little_is_launched_beside_the_kernels(parents: list[int], contexts: int) -> None:
    """Short rows are bound by the CPU, which pays for every operator of every layer."""
    forest = make_forest(
        [p if p < 0 else i // 3 * 3 for i, p in enumerate(parents)], [5] * len(parents)
    )
    plan = lay_out(forest, device=CPU).attention
    (query, key, value), grad = random_inputs(forest.num_tokens, torch.bfloat16)
    entered = (query.squeeze(1), key.squeeze(1), value.squeeze(1))
    seen = Operators()
    kernel = UnseenKernel(seen)
    with seen:
        output, logsumexp = attend(entered, plan, kernel, scale=1.0)
    assert kernel.calls == 1 + contexts and len(seen.launched) <= 7 * contexts, seen.launched
    seen.names.clear()
    with seen:
        attend_backward(grad, entered, output, logsumexp, plan, kernel, scale=1.0)
    assert kernel.calls == 2 + 2 * contexts and len(seen.launched) <= 4 * contexts, seen.launched


def test_attended_pairs_is_what_the_mask_lets_through() -> None:
    forest = make_forest([NO_PARENT, 0, 1, 0, NO_PARENT, 4], [3, 2, 2, 4, 1, 2])
    assert int(tree_mask(forest, forest.num_tokens).sum()) == forest.attended_pairs


def test_derivatives_are_those_of_finite_differences() -> None:
    """Roots with branches of branches."""
    forest = make_forest([NO_PARENT, 0, 1, 1, 0, NO_PARENT], [2, 1, 1, 1, 1, 1])
    plan = lay_out(forest, multiple=1, device=CPU).attention
    inputs, _ = random_inputs(forest.num_tokens, torch.float64)

    def run(*qkv: Tensor) -> Tensor:
        output: Tensor = tree_attention()(*qkv, packed_seq_params=plan)
        return output

    leaves = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(run, leaves, atol=1e-7, fast_mode=True)


def test_bf16_keys_of_a_shared_prefix_gather_gradients_in_fp32() -> None:
    """Forty branches attend one prefix; rounding their gradients one by one would show."""
    forest = make_forest([NO_PARENT, *[0] * 40], [4, *[3] * 40])
    tokens = lay_out(forest, multiple=1, device=CPU)
    inputs, grad = random_inputs(tokens.num_tokens, torch.bfloat16)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = tree_attention()(*leaves, packed_seq_params=tokens.attention)
    assert output.dtype == torch.bfloat16
    grads = torch.autograd.grad(output, leaves, grad.reshape(output.shape))
    exact = [tensor.squeeze(1).double() for tensor in inputs]
    mask = tree_mask(forest, tokens.num_tokens)
    wanted = dense_gradients(exact, mask, HEAD_DIM**-0.5, grad.double())
    for actual, expected in zip(grads, wanted, strict=True):
        assert actual.dtype == torch.bfloat16
        error = (actual.squeeze(1).double() - expected).norm() / expected.norm()
        assert error < 5e-3


def test_the_softmax_scale_is_taken() -> None:
    forest = make_forest([NO_PARENT], [3])
    plan = lay_out(forest, multiple=1, device=CPU).attention
    (query, key, value), _ = random_inputs(3, torch.float64)
    half = tree_attention(softmax_scale=0.5 * HEAD_DIM**-0.5)
    torch.testing.assert_close(
        half(query, key, value, packed_seq_params=plan),
        tree_attention()(0.5 * query, key, value, packed_seq_params=plan),
    )
