"""Rotary position embedding: frequencies as transformers computes them, angles as Megatron takes.

Megatron's own module derives positions from offsets in the pack and has fixed factors for llama3.
The model is therefore built without it, and takes the angles from here, for the positions of a
pack's segments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from megatron_longpo.model.architectures import Architecture


def inverse_frequencies(arch: Architecture) -> torch.Tensor:
    """Returns [head_dim / 2] float32, in radians per position.

    The order of operations follows transformers, so that the numbers are equal to the last bit.
    Keep the result a plain attribute: a module's `.bfloat16()` would round a buffer.
    """
    exponents = torch.arange(0, arch.head_dim, 2, dtype=torch.float32) / arch.head_dim
    frequencies = 1.0 / (arch.rope.theta**exponents)
    scaling = arch.rope.scaling
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    if scaling["rope_type"] == "yarn":
        return _yarn_frequencies(
            arch.rope.theta,
            arch.head_dim,
            factor=scaling["factor"],
            most_turns=scaling.get("beta_fast", 32),
            fewest_turns=scaling.get("beta_slow", 1),
            original_positions=scaling["original_max_position_embeddings"],
            truncate=scaling.get("truncate", True),
        )
    assert scaling["rope_type"] == "llama3", scaling
    return _llama3_frequencies(
        frequencies,
        factor=scaling["factor"],
        low_factor=scaling["low_freq_factor"],
        high_factor=scaling["high_freq_factor"],
        original_positions=scaling["original_max_position_embeddings"],
    )


def attention_scale(arch: Architecture) -> float | None:
    """Returns the factor of scores before the softmax; None = the usual 1 / sqrt(head_dim).

    YaRN multiplies cosines and sines by a factor: queries and keys both, and so scores by its
    square. Here the angles stay as they are, and the scores get the square.
    """
    factor = _yarn_attention_factor(arch.rope.scaling or {})
    return None if factor == 1.0 else factor**2 / math.sqrt(arch.head_dim)


def rotary_angles(inv_freq: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Returns [T, 1, 1, head_dim] float32 angles for [T] integer positions.

    The halves are concatenated, not interleaved, as Megatron's `apply_rotary_pos_emb` takes them
    for `sbhd` tensors. Positions are exact in float32 up to 2^24.

    Args:
        inv_freq: [head_dim / 2] float32, radians a position.
        position_ids: [T].
    """
    angles = position_ids.to(torch.float32)[:, None] * inv_freq.to(position_ids.device)[None, :]
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def _llama3_frequencies(
    frequencies: torch.Tensor,
    *,
    factor: float,
    low_factor: float,
    high_factor: float,
    original_positions: int,
) -> torch.Tensor:
    """Divides slow frequencies by `factor`, keeps fast ones, and interpolates between."""
    wavelengths = 2 * math.pi / frequencies
    longest_kept = original_positions / high_factor
    shortest_divided = original_positions / low_factor
    result = torch.where(wavelengths > shortest_divided, frequencies / factor, frequencies)
    smooth = (original_positions / wavelengths - low_factor) / (high_factor - low_factor)
    blended = (1 - smooth) * result / factor + smooth * result
    between = (wavelengths >= longest_kept) & (wavelengths <= shortest_divided)
    return torch.where(between, blended, result)


def _yarn_frequencies(
    theta: float,
    head_dim: int,
    *,
    factor: float,
    most_turns: float,
    fewest_turns: float,
    original_positions: int,
    truncate: bool,
) -> torch.Tensor:
    """Returns the frequencies of YaRN (arXiv 2309.00071).

    Those that turn often within the original positions are kept, those that turn seldom are divided
    by `factor`, and those between are blended along a ramp.
    """

    def dimension_of(turns: float) -> float:
        """Returns the dimension whose frequency turns so often over the original positions."""
        wavelength = original_positions / (turns * 2 * math.pi)
        return (head_dim * math.log(wavelength)) / (2 * math.log(theta))

    low, high = dimension_of(most_turns), dimension_of(fewest_turns)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
    kept = 1 - ramp.clamp(0, 1)
    wavelengths = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    """Returns transformers' factor of cosines and sines; 1 for any other scaling."""
    if scaling.get("rope_type") != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0

    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale is not None and mscale_all_dim is not None:
        return growth(mscale) / growth(mscale_all_dim)
    return growth(1.0)
