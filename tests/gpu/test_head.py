"""The log-prob head's GPU kernels against a softmax over all logits, and its memory."""

from __future__ import annotations

import pytest
import torch

from megatron_longpo.model.head.logprobs import VocabularyShard, edge_logps
from megatron_longpo.parallel.groups import Groups
from tools.bench_head import measure

pytestmark = pytest.mark.gpu

TOKENS, HIDDEN, VOCAB, PADDED = 700, 256, 5003, 5120


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("chunk_edges", [64, 10_000])
def test_edges_get_what_the_full_softmax_gives(
    dtype: torch.dtype, chunk_edges: int, single_process: Groups
) -> None:
    """A run of neighbours, then a branch whose first source has been one before."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, device="cuda").to(dtype)
    weight = 0.1 * torch.randn(PADDED, HIDDEN, generator=generator, device="cuda")
    weight[VOCAB:] = 10 * hidden.float().mean(0)
    weight = weight.to(dtype)
    sources = torch.tensor([*range(600), 400, *range(600, TOKENS, 3)], device="cuda")
    targets = torch.randint(0, VOCAB, sources.shape, generator=generator, device="cuda")
    grads = torch.randn(len(sources), generator=generator, device="cuda")
    shard = VocabularyShard.of_rank(rows=PADDED, vocab_size=VOCAB, group=single_process.tensor)

    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    chunk_bytes = dtype.itemsize * PADDED * chunk_edges
    actual = edge_logps(*leaves, sources, targets, shard, chunk_bytes=chunk_bytes)
    actual_grads = torch.autograd.grad(actual, leaves, grads)

    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    logps = torch.log_softmax(exact[0] @ exact[1][:VOCAB].T, dim=-1)[sources, targets]
    expected_grads = torch.autograd.grad(logps, exact, grads.double())
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-3  # matrix units may take tf32
    for ours, theirs in zip((actual, *actual_grads), (logps, *expected_grads), strict=True):
        assert float((ours.double() - theirs).norm() / theirs.norm()) < tolerance
    assert actual_grads[1][VOCAB:].eq(0).all(), "padding rows are not trained"


@pytest.mark.parametrize(("hidden", "vocabulary"), [(4096, 32000), (3584, 152064)])
def test_memory_stays_within_its_limit(
    hidden: int, vocabulary: int, single_process: Groups
) -> None:
    row = measure(131072, hidden, vocabulary, groups_of_one=single_process, dtype=torch.bfloat16)
    assert row["ours_extra_gib"] <= row["limit_gib"]
