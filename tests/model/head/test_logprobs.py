"""Log-probabilities of edges equal `log_softmax` over all logits, which the head never builds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_longpo.model.head.logprobs import VocabularyShard, edge_logps
from megatron_longpo.parallel.groups import Groups

TOKENS, HIDDEN, VOCAB, PADDED = 9, 6, 11, 16
SOURCES = [0, 3, 3, 3, 8, 5, 3]
TARGETS = [10, 0, 4, 4, 7, 0, 10]
"""One source with several targets, one edge twice, the first and the last token id."""


def shard(groups: Groups, *, rows: int = PADDED, vocab_size: int = VOCAB) -> VocabularyShard:
    return VocabularyShard.of_rank(rows=rows, vocab_size=vocab_size, group=groups.tensor)


def head_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, a weight whose padding rows would win every softmax, sources and targets."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64)
    weight[VOCAB:] = 100 * hidden.mean(0)
    return (
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        torch.tensor(SOURCES),
        torch.tensor(TARGETS),
    )


def full_softmax(hidden: Tensor, weight: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    logps = torch.log_softmax(hidden @ weight[:VOCAB].T, dim=-1)
    return logps[sources, targets]


@pytest.mark.parametrize("chunk_edges", [1, 3, len(SOURCES), 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_edges_get_what_the_full_softmax_gives(
    dtype: torch.dtype, chunk_edges: int, single_process: Groups
) -> None:
    inputs = head_inputs(dtype)
    chunk_bytes = dtype.itemsize * PADDED * chunk_edges
    actual = edge_logps(*inputs, shard(single_process), chunk_bytes=chunk_bytes)
    expected = full_softmax(*inputs)
    assert actual.dtype == dtype and actual.shape == (len(SOURCES),)
    torch.testing.assert_close(actual, expected)

    # Each edge with a weight of its own, as the objective's chain rule gives it.
    grad = torch.arange(1.0, len(SOURCES) + 1, dtype=dtype)
    actual_grads = torch.autograd.grad(actual, inputs[:2], grad)
    expected_grads = torch.autograd.grad(expected, inputs[:2], grad)
    for ours, theirs in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert actual_grads[1][VOCAB:].eq(0).all(), "padding rows are not trained"


@pytest.mark.parametrize("chunk_edges", [2, 3, 1000])
@pytest.mark.parametrize(
    "sources",
    [
        list(range(TOKENS)),
        [1, 2, 3, 4, 5, 6],
        # A shared prefix: its last token leads into both branches.
        [0, 1, 2, 3, 4, 5, 3, 6, 7, 8],
    ],
    ids=["every token", "a run", "a tree"],
)
def test_neighbouring_sources_are_taken_as_they_lie(
    sources: list[int], chunk_edges: int, single_process: Groups
) -> None:
    hidden, weight, _, _ = head_inputs()
    targets = torch.arange(len(sources)) % VOCAB
    inputs = (hidden, weight, torch.tensor(sources), targets)
    chunk_bytes = 8 * PADDED * chunk_edges
    actual = edge_logps(*inputs, shard(single_process), chunk_bytes=chunk_bytes)
    expected = full_softmax(*inputs)
    torch.testing.assert_close(actual, expected)
    grad = torch.arange(1.0, len(sources) + 1, dtype=torch.float64)
    actual_grads = torch.autograd.grad(actual, inputs[:2], grad)
    for ours, theirs in zip(
        actual_grads, torch.autograd.grad(expected, inputs[:2], grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_derivatives_are_those_of_finite_differences(single_process: Groups) -> None:
    hidden, weight, sources, targets = head_inputs()

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        return edge_logps(
            hidden, weight, sources, targets, shard(single_process), chunk_bytes=8 * PADDED
        )

    assert torch.autograd.gradcheck(run, (hidden, weight))


def test_bf16_sums_gradients_in_fp32(single_process: Groups) -> None:
    """One source with five hundred edges, an edge a chunk."""
    hidden, weight, _, _ = head_inputs(torch.bfloat16)
    sources = torch.full((500,), 2)
    targets = torch.arange(500) % VOCAB
    inputs = (hidden, weight, sources, targets)
    actual = edge_logps(*inputs, shard(single_process), chunk_bytes=2 * PADDED)
    assert actual.dtype == torch.float32
    exact = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    expected = full_softmax(exact[0], exact[1], sources, targets)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=2e-2)
    actual_grads = torch.autograd.grad(actual.sum(), (hidden, weight))
    expected_grads = torch.autograd.grad(expected.sum(), exact)
    for ours, theirs in zip(actual_grads, expected_grads, strict=True):
        assert ours.dtype == torch.bfloat16
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 1e-2


def test_steep_logits_stay_finite(single_process: Groups) -> None:
    hidden, weight, sources, targets = head_inputs(torch.float32)
    logps = edge_logps(1e4 * hidden, weight, sources, targets, shard(single_process))
    grads = torch.autograd.grad(logps.sum(), (hidden, weight))
    for tensor in (logps, *grads):
        assert torch.isfinite(tensor).all()


def test_no_edges_give_nothing_and_a_zero_gradient(single_process: Groups) -> None:
    """A context-parallel rank without an answer token is the normal case."""
    hidden, weight, _, _ = head_inputs()
    nothing = torch.empty(0, dtype=torch.int64)
    logps = edge_logps(hidden, weight, nothing, nothing, shard(single_process))
    assert logps.shape == (0,)
    for gradient in torch.autograd.grad(logps.sum(), (hidden, weight)):
        assert gradient.eq(0).all()


def test_a_frozen_weight_gets_no_gradient(single_process: Groups) -> None:
    hidden, weight, sources, targets = head_inputs()
    logps = edge_logps(hidden, weight, sources, targets, shard(single_process))
    (expected,) = torch.autograd.grad(logps.sum(), hidden)
    frozen = weight.detach()
    logps = edge_logps(hidden, frozen, sources, targets, shard(single_process))
    (actual,) = torch.autograd.grad(logps.sum(), hidden)
    assert torch.equal(actual, expected) and frozen.grad is None


def test_backward_keeps_no_logits(single_process: Groups) -> None:
    inputs = head_inputs()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        edge_logps(*inputs, shard(single_process))
    assert kept and max(kept) <= max(inputs[0].numel(), inputs[1].numel())


@pytest.mark.parametrize(
    ("rank", "start", "num_valid"), [(0, 0, 128), (1, 128, 128), (2, 256, 44), (3, 384, 0)]
)
def test_shards_of_a_vocabulary(rank: int, start: int, num_valid: int) -> None:
    group: Any = SimpleNamespace(rank=lambda: rank)
    shard_of_rank = VocabularyShard.of_rank(rows=128, vocab_size=300, group=group)
    assert (shard_of_rank.start, shard_of_rank.num_valid) == (start, num_valid)
