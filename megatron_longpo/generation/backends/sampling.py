"""The next tokens of several requests, each with its own sampling and random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_longpo.generation.backends.base import Sampling


def next_tokens(
    logits_NV: torch.Tensor,
    samplings: Sequence[Sampling],
    generators: Sequence[torch.Generator],
) -> list[int]:
    """One token a row; a row's token depends on its logits and its own generator alone."""
    sampled = {
        row: (sampling, generators[row])
        for row, sampling in enumerate(samplings)
        if sampling.temperature > 0
    }
    tokens: list[int] = draw(logits_NV, sampled).tolist()
    return tokens


def draw(
    logits_NV: torch.Tensor, sampled: dict[int, tuple[Sampling, torch.Generator]]
) -> torch.Tensor:
    """The next tokens [N], left on the device: greedy but for the rows in `sampled`."""
    tokens_N = logits_NV.argmax(dim=-1)
    alike: dict[tuple[float, float], list[int]] = {}
    for row, (sampling, _) in sampled.items():
        alike.setdefault((sampling.temperature, sampling.top_p), []).append(row)
    for rows in alike.values():
        probabilities_nV = nucleus(logits_NV[rows], sampled[rows[0]][0])
        drawn = [
            torch.multinomial(probabilities_V, 1, generator=sampled[row][1])
            for row, probabilities_V in zip(rows, probabilities_nV, strict=True)
        ]
        tokens_N[rows] = torch.cat(drawn)
    return tokens_N


def nucleus(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities [..., V] at a temperature, of the likeliest tokens that reach `top_p` together.

    They are not normalised again. The likeliest token always stays.
    """
    probabilities = (logits.float() / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        likeliest, order = probabilities.sort(dim=-1, descending=True)
        before = likeliest.cumsum(dim=-1) - likeliest
        likeliest = likeliest.masked_fill(before >= sampling.top_p, 0)
        probabilities = torch.empty_like(probabilities).scatter_(-1, order, likeliest)
    return probabilities
