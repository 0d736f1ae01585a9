"""Gradients of a few steps, for tests of optimizers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LR, ALPHA, EPS = 1e-2, 0.9, 1e-6


def gradients(step: int, parameters: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) * 10.0 ** (1 - step) for p in parameters]
