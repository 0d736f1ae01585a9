from __future__ import annotations

import pytest
import torch

from megatron_longpo.generation.backends.base import Sampling
from megatron_longpo.generation.backends.sampling import draw, nucleus


def test_nucleus() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    def kept(temperature: float, top_p: float) -> list[float]:
        sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=1)
        return [round(p, 6) for p in nucleus(logits, sampling).tolist()]

    assert kept(1.0, 1.0) == [0.5, 0.3, 0.15, 0.05]
    assert kept(1.0, 0.79) == [0.5, 0.3, 0, 0]
    assert kept(1.0, 0.01) == [0.5, 0, 0, 0]
    sharper = kept(0.5, 1.0)
    assert sharper[0] == pytest.approx(0.25 / (0.25 + 0.09 + 0.0225 + 0.0025), abs=1e-6)


def test_samples_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).log()
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=1)
    generator = torch.Generator().manual_seed(0)
    drawn = [int(draw(logits, {0: (sampling, generator)})) for _ in range(2000)]
    shares = [drawn.count(token) / 2000 for token in range(4)]
    assert shares == pytest.approx([0.5, 0.3, 0.2, 0.0], abs=0.04)
    assert draw(logits, {}).tolist() == [0]
