"""The next tokens of several requests, each with its own sampling and random numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_longpo.generation.backends.base import Sampling

Sampler = tuple[Sampling, torch.Generator]
"""How a request's tokens are drawn, and its own random numbers."""


def draw(logits_NV: torch.Tensor, samplers: Mapping[int, Sampler]) -> torch.Tensor:
    """Returns the next tokens [N], left on the device: greedy but for the indices in `samplers`.

    A token depends on its own logits and generator alone.
    """
    tokens_N = logits_NV.argmax(dim=-1)
    alike: dict[tuple[float, float], list[int]] = {}
    for index, (sampling, _) in samplers.items():
        alike.setdefault((sampling.temperature, sampling.top_p), []).append(index)
    for indices in alike.values():
        probabilities_nV = nucleus(logits_NV[indices], samplers[indices[0]][0])
        drawn = [
            torch.multinomial(probabilities_V, 1, generator=samplers[index][1])
            for index, probabilities_V in zip(indices, probabilities_nV, strict=True)
        ]
        tokens_N[indices] = torch.cat(drawn)
    return tokens_N


def nucleus(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Returns probabilities [..., V] at a temperature of the likeliest tokens that reach `top_p`
    together, and 0 of others.

    They are not normalised again. The likeliest token always stays.
    """
    probabilities = (logits.float() / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        likeliest, order = probabilities.sort(dim=-1, descending=True)
        before = likeliest.cumsum(dim=-1) - likeliest
        likeliest = likeliest.masked_fill(before >= sampling.top_p, 0)
        probabilities = torch.empty_like(probabilities).scatter_(-1, order, likeliest)
    return probabilities
