"""RoPE as a Hugging Face config.json and `model.rope_scaling` spell it, checked; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longpo.errors import UserError, nearest

ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Supported scalings and the numbers each of them needs."""

OPTIONAL_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "yarn": (
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
"""What a scaling may have besides; transformers has defaults. All are numbers but `truncate`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding of one model, after the overrides of our config."""

    theta: float
    scaling: Mapping[str, Any] | None
    """None = plain RoPE, else `rope_type`, its keys of `ROPE_KEYS`, and those of its keys in
    `OPTIONAL_ROPE_KEYS` that are set."""
    max_position_embeddings: int


def read_rope_config(
    path: Path,
    config: Mapping[str, Any],
    *,
    own_positions: int,
    theta: float | None,
    scaling: Mapping[str, Any] | None,
    max_position_embeddings: int | None,
) -> RopeConfig:
    """Reads the RoPE of a model; `theta`, `scaling` and the last argument replace what it says.

    Args:
        path: of config.json, for messages.
        config: its content.
        own_positions: its `max_position_embeddings`.
        theta: of our config; None = the model's own.
        scaling: of our config; None = the model's own.
        max_position_embeddings: of our config; None = the model's own.

    Raises:
        UserError: for a scaling that is not supported or lacks a number.
    """
    # The order is that of transformers 5: rope_scaling wins over rope_parameters, and a theta
    # inside either wins over the top-level one.
    own = config.get("rope_scaling") or config.get("rope_parameters") or {}
    where = str(path)
    chosen = own
    if scaling is not None:
        where, chosen = "model.rope_scaling", scaling
    for candidate in (
        theta,
        None if scaling is None else scaling.get("rope_theta"),
        own.get("rope_theta"),
        config.get("rope_theta"),
        10000.0,
    ):
        if candidate is not None:
            theta = float(candidate)
            break
    assert theta is not None
    positions = own_positions if max_position_embeddings is None else max_position_embeddings
    return RopeConfig(
        theta=theta,
        scaling=_checked_scaling(where, chosen, own_positions),
        max_position_embeddings=positions,
    )


def _checked_scaling(
    where: str, scaling: Mapping[str, Any], own_positions: int
) -> dict[str, Any] | None:
    """Returns `rope_type` and exactly what it needs and takes, None for plain RoPE."""
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if float(scaling.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError(
            f"{where}: partial_rotary_factor ({scaling['partial_rotary_factor']}) is not supported"
        )
    if rope_type == "default":
        return None
    if rope_type not in ROPE_KEYS:
        supported = ", ".join(["default", *ROPE_KEYS])
        hint = nearest(str(rope_type), ROPE_KEYS)
        remedy = f" (did you mean {hint}?)" if hint else ""
        raise UserError(
            f"{where}: rope_type ({rope_type}) is not supported{remedy}; supported: {supported}"
        )
    values = dict(scaling)
    # transformers 5 fills this one in; an override of max_position_embeddings must not move it,
    # since it is the length that the weights were first trained at.
    values.setdefault("original_max_position_embeddings", own_positions)
    missing = [key for key in ROPE_KEYS[rope_type] if not _is_number(values.get(key))]
    if missing:
        raise UserError(f"{where}: rope_type {rope_type} needs a number for {', '.join(missing)}")
    if not values["factor"] >= 1:
        raise UserError(f"{where}: factor ({values['factor']}) must be at least 1")
    checked = {"rope_type": rope_type, **{key: values[key] for key in ROPE_KEYS[rope_type]}}
    for key in OPTIONAL_ROPE_KEYS.get(rope_type, ()):
        value = values.get(key)
        if value is None:
            continue
        is_switch = key == "truncate"
        if not (isinstance(value, bool) if is_switch else _is_number(value) and value > 0):
            rule = "true or false" if is_switch else "a number above 0"
            raise UserError(f"{where}: {key} ({value}) of rope_type {rope_type} must be {rule}")
        checked[key] = value if is_switch else float(value)
    return checked


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
