from __future__ import annotations

import pytest
import torch

from megatron_longpo.model.head.logit_rows import logits_gradient_, row_statistics

VALID, COLUMNS = 11, 16
TARGETS = torch.tensor([10, -1, 0, 4])
"""The last valid column, one of another rank, the first one, one in the middle."""


def random_logits(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(TARGETS), COLUMNS, generator=generator, dtype=torch.float64)
    logits[:, VALID:] = 50
    return logits.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_statistics_are_over_valid_columns(dtype: torch.dtype) -> None:
    logits = random_logits(dtype)
    normalizers, picked = row_statistics(logits, TARGETS, num_valid=VALID)
    exact = logits.double()[:, :VALID]
    assert normalizers.dtype == picked.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(normalizers.double(), exact.logsumexp(-1), rtol=1e-6, atol=1e-6)
    expected = torch.stack([exact[0, 10], torch.tensor(0.0).double(), exact[2, 0], exact[3, 4]])
    torch.testing.assert_close(picked.double(), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_the_gradient_takes_the_logits_place(dtype: torch.dtype, tolerance: float) -> None:
    logits = random_logits(dtype)
    exact = logits.double()[:, :VALID].requires_grad_()
    normalizers = exact.detach().logsumexp(-1)
    grads = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    logps = torch.log_softmax(exact, dim=-1)
    # A target on another rank leaves only the softmax's part here.
    chosen = logps[torch.arange(4), TARGETS.clamp(min=0)]
    chosen = torch.where(TARGETS >= 0, chosen, -exact.logsumexp(-1))
    (expected,) = torch.autograd.grad((chosen * grads).sum(), exact)
    place = logits.data_ptr()
    accumulator = torch.promote_types(dtype, torch.float32)
    actual = logits_gradient_(
        logits, TARGETS, normalizers.to(accumulator), grads.to(accumulator), num_valid=VALID
    )
    assert actual.data_ptr() == place and actual.dtype == dtype
    torch.testing.assert_close(actual.double()[:, :VALID], expected, rtol=tolerance, atol=tolerance)
    assert actual[:, VALID:].eq(0).all()


def test_a_rank_that_holds_padding_alone_adds_nothing() -> None:
    logits, nowhere = random_logits(torch.float32), torch.full((len(TARGETS),), -1)
    normalizers, picked = row_statistics(logits, nowhere, num_valid=0)
    assert normalizers.isneginf().all() and picked.eq(0).all()
    ones = torch.ones(len(TARGETS))
    assert logits_gradient_(logits, nowhere, ones, ones, num_valid=0).eq(0).all()
