"""Rotary position embedding: frequencies as transformers computes them, angles as Megatron wants.

Megatron's own module derives positions from the packed offset and fixes llama3's factors, so the
model is built without it and the angles come from here, for the positions of a pack's segments.
"""

from __future__ import annotations

import math

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
    assert scaling["rope_type"] == "llama3", scaling
    return _llama3_frequencies(
        frequencies,
        factor=scaling["factor"],
        low_factor=scaling["low_freq_factor"],
        high_factor=scaling["high_freq_factor"],
        original_positions=scaling["original_max_position_embeddings"],
    )


def rotary_angles(inv_freq: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """[head_dim / 2] float32, [T] integer positions -> [T, 1, 1, head_dim] float32 angles.

    The halves are concatenated, not interleaved: what Megatron's `apply_rotary_pos_emb` takes for
    `sbhd` tensors. Positions stay exact in float32 up to 2^24.
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
    """Slow frequencies are divided by `factor`, fast ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    longest_kept = original_positions / high_factor
    shortest_divided = original_positions / low_factor
    result = torch.where(wavelengths > shortest_divided, frequencies / factor, frequencies)
    smooth = (original_positions / wavelengths - low_factor) / (high_factor - low_factor)
    blended = (1 - smooth) * result / factor + smooth * result
    between = (wavelengths >= longest_kept) & (wavelengths <= shortest_divided)
    return torch.where(between, blended, result)
