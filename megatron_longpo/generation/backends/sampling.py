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
    greedy = logits_NV.argmax(dim=-1).tolist()
    if all(sampling.temperature == 0 for sampling in samplings):
        return greedy
    tokens = []
    for row, (sampling, generator) in enumerate(zip(samplings, generators, strict=True)):
        if sampling.temperature == 0:
            tokens.append(greedy[row])
        else:
            probabilities_V = nucleus(logits_NV[row], sampling)
            tokens.append(int(torch.multinomial(probabilities_V, 1, generator=generator)))
    return tokens


def nucleus(logits_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities [V] at a temperature, of the likeliest tokens that reach `top_p` together.

    They are not normalised again. The likeliest token always stays.
    """
    probabilities_V = (logits_V.float() / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        sorted_V, order_V = probabilities_V.sort(descending=True)
        before_V = sorted_V.cumsum(dim=-1) - sorted_V
        probabilities_V[order_V[before_V >= sampling.top_p]] = 0
    return probabilities_V
