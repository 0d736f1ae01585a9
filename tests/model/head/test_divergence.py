"""The chunked divergence against torch's own, over all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_longpo.model.head.divergence import reverse_kl
from megatron_longpo.model.head.logprobs import VocabularyShard
from megatron_longpo.parallel.groups import Groups

TOKENS, HIDDEN, TEACHER_HIDDEN, VOCAB, PADDED, PLACES = 7, 8, 6, 11, 16, 9


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    """Fresh numbers; a source may be compared at several places."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "hidden": randn(TOKENS, HIDDEN).requires_grad_(),
        "weight": randn(PADDED, HIDDEN).requires_grad_(),
        "sources": torch.randint(TOKENS, (PLACES,), generator=generator),
        "teacher_states": randn(PLACES, TEACHER_HIDDEN),
        "teacher_weight": randn(PADDED, TEACHER_HIDDEN),
    }


def plain(inputs: dict[str, Tensor]) -> Tensor:
    student = (inputs["hidden"][inputs["sources"]] @ inputs["weight"][:VOCAB].T).log_softmax(-1)
    teacher = (inputs["teacher_states"] @ inputs["teacher_weight"][:VOCAB].T).log_softmax(-1)
    # torch's first argument is the second distribution of KL(student || teacher).
    return F.kl_div(teacher, student, log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("chunk_places", [1, 2, PLACES, 100])
def test_values_and_gradients(
    inputs: dict[str, Tensor], chunk_places: int, single_process: Groups
) -> None:
    shard = VocabularyShard.of_rank(rows=PADDED, vocab_size=VOCAB, group=single_process.tensor)
    divergences = reverse_kl(**inputs, shard=shard, chunk_bytes=4 * PADDED * chunk_places)
    expected = plain(inputs)
    torch.testing.assert_close(divergences, expected, rtol=1e-10, atol=1e-12)
    weights = torch.linspace(-1, 2, PLACES, dtype=torch.float64)
    trained = (inputs["hidden"], inputs["weight"])
    gradients = torch.autograd.grad((divergences * weights).sum(), trained)
    for gradient, wanted in zip(
        gradients, torch.autograd.grad((expected * weights).sum(), trained), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)
    assert gradients[1][VOCAB:].eq(0).all(), "padding rows are no tokens"


def test_equal_distributions_do_not_diverge(single_process: Groups) -> None:
    """Nor is there a slope: the divergence is at its least."""
    hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    hidden.requires_grad_()
    weight = torch.randn(PADDED, HIDDEN, generator=torch.Generator().manual_seed(2))
    shard = VocabularyShard.of_rank(rows=PADDED, vocab_size=VOCAB, group=single_process.tensor)
    sources = torch.arange(TOKENS)
    divergences = reverse_kl(hidden, weight, sources, hidden.detach(), weight, shard)
    assert divergences.dtype == torch.float32 and divergences.abs().max() < 1e-6
    (gradient,) = torch.autograd.grad(divergences.sum(), hidden)
    assert gradient.abs().max() < 1e-5


def test_no_places(inputs: dict[str, Tensor], single_process: Groups) -> None:
    """A context-parallel rank often has none, and must still take part in backward."""
    shard = VocabularyShard.of_rank(rows=PADDED, vocab_size=VOCAB, group=single_process.tensor)
    none = {**inputs, "sources": inputs["sources"][:0], "teacher_states": torch.zeros(0, 6)}
    divergences = reverse_kl(**none, shard=shard)
    assert divergences.shape == (0,)
    (gradient,) = torch.autograd.grad(divergences.sum(), inputs["weight"])
    assert gradient.eq(0).all()
