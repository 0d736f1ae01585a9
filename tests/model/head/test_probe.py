"""Greedy hits and comparison with a base model, against all logits at once."""

from __future__ import annotations

import pytest
import torch

from megatron_longpo.model.head.logprobs import VocabularyShard, edge_logps
from megatron_longpo.model.head.probe import compare_with_base, edge_outcomes
from megatron_longpo.parallel.groups import Groups

TOKENS, HIDDEN, ROWS, VOCABULARY = 30, 8, 24, 20
"""Four rows of the output weight are padding, and larger than all others."""


def weights(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(ROWS, HIDDEN, generator=generator)
    weight[VOCABULARY:] *= 100
    return hidden, weight


@pytest.mark.parametrize("chunk_bytes", [1, 4 * ROWS * 7, 2**20])
def test_hits_are_argmaxes_over_the_tokens_that_exist(
    chunk_bytes: int, single_process: Groups
) -> None:
    hidden, weight = weights(0)
    shard = VocabularyShard.of_rank(rows=ROWS, vocab_size=VOCABULARY, group=single_process.tensor)
    sources = torch.tensor([3, 4, 5, 5, 29, 0, 17, 11])
    best = (hidden @ weight[:VOCABULARY].T).argmax(-1)[sources]
    targets = torch.where(torch.arange(len(sources)) % 2 == 0, best, (best + 1) % VOCABULARY)
    logps, hits = edge_outcomes(hidden, weight, sources, targets, shard, chunk_bytes=chunk_bytes)
    assert hits.tolist() == [1, 0] * 4
    torch.testing.assert_close(logps, edge_logps(hidden, weight, sources, targets, shard))


def test_of_equally_likely_tokens_the_first_is_written(single_process: Groups) -> None:
    hidden, weight = weights(1)
    weight[9] = weight[4] = 100 * hidden[2]
    shard = VocabularyShard.of_rank(rows=ROWS, vocab_size=VOCABULARY, group=single_process.tensor)
    sources, targets = torch.tensor([2, 2]), torch.tensor([4, 9])
    assert edge_outcomes(hidden, weight, sources, targets, shard)[1].tolist() == [1, 0]


@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_the_comparison_is_kl_of_base_and_policy(chunk_bytes: int, single_process: Groups) -> None:
    (hidden, weight), (base_hidden, base_weight) = weights(2), weights(3)
    base_weight[:6] += weight[:6]
    shard = VocabularyShard.of_rank(rows=ROWS, vocab_size=VOCABULARY, group=single_process.tensor)
    sources = torch.arange(0, TOKENS, 2)
    base_states = hidden[sources] + 0.1 * base_hidden[sources]
    found = compare_with_base(
        hidden, weight, sources, base_states, base_weight, shard, chunk_bytes=chunk_bytes
    )
    p = torch.log_softmax(hidden[sources].double() @ weight[:VOCABULARY].double().T, -1)
    q = torch.log_softmax(base_states.double() @ base_weight[:VOCABULARY].double().T, -1)
    expected = torch.nn.functional.kl_div(p, q, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-6)
    agreements = p.argmax(-1) == q.argmax(-1)
    assert found[1].bool().tolist() == agreements.tolist()
    assert 0 < int(agreements.sum()) < len(sources)
