"""Compares Hugging Face folders, one tensor in memory at a time.

Each comparison returns a description and raises CheckFailed at the first difference.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from checkpoints_convert.hf_weights import HfWeights, is_ignored
from megatron_longpo.errors import CheckFailed
from megatron_longpo.model.architectures import Architecture, read_architecture, read_hf_config

BITS = {2: torch.int16, 4: torch.int32}
"""Integers as wide as a dtype, by bytes: they tell -0 from 0."""

NOT_COMPARED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Keys of transformers' configs that are not compared; dtypes are compared with the weights."""


def compare_weights(
    source: HfWeights, export: HfWeights, arch: Architecture, *, dtype: torch.dtype | None
) -> str:
    """Compares weights bit by bit. `dtype` is that of the conversion; None = unchanged.

    If embedding and output are tied, an output layer in the source is never read, and none is
    exported.
    """
    names = [name for name in source.names if not is_ignored(name, arch)]
    if missing := sorted(set(names) ^ set(export.names)):
        where = "source" if missing[0] in export else "export"
        raise CheckFailed(f"{missing[0]} is missing in the {where}")
    num_elements = 0
    for name in names:
        expected, actual = source.read(name), export.read(name)
        expected = expected if dtype is None else expected.to(dtype)
        _compare_tensor(name, expected, actual)
        num_elements += expected.numel()
    dtypes = sorted({str(export.dtype(name)).removeprefix("torch.") for name in names})
    return f"{len(names)} tensors of {num_elements:,} weights, {', '.join(dtypes)}, bit by bit"


def _compare_tensor(name: str, expected: Tensor, actual: Tensor) -> None:
    if expected.dtype != actual.dtype:
        raise CheckFailed(f"{name} has dtype {actual.dtype} instead of {expected.dtype}")
    if expected.shape != actual.shape:
        raise CheckFailed(f"{name} has shape {list(actual.shape)} not {list(expected.shape)}")
    bits = BITS[expected.itemsize]
    if not torch.equal(expected.view(bits), actual.view(bits)):
        difference = (expected.double() - actual.double()).abs()
        raise CheckFailed(
            f"{name} differs in {int((difference > 0).sum())} of {expected.numel()} weights, by up "
            f"to {difference.max().item():.3g}"
        )


def compare_shapes(source: HfWeights, trained: HfWeights, arch: Architecture) -> str:
    """Compares names and shapes of a trained model's tensors; training has changed the values."""
    expected, actual = (
        {name: list(found.shape(name)) for name in found.names if not is_ignored(name, arch)}
        for found in (source, trained)
    )
    for name in sorted(expected | actual):
        _compare_value(f"shape of {name}", expected.get(name), actual.get(name))
    return f"{len(expected)} tensors have the source's names and shapes"


def compare_configs(source: str, export: str, *, trained: bool = False) -> str:
    """Compares what we and transformers read from both config.json.

    If `trained`, positions and RoPE may differ.
    """
    theirs, ours = read_architecture(source), read_architecture(export)
    if trained:
        theirs = dataclasses.replace(theirs, rope=ours.rope)
    for field in dataclasses.fields(theirs):
        _compare_value(field.name, getattr(theirs, field.name), getattr(ours, field.name))
    _check_both_spellings(export, ours)
    if trained:
        return "same architecture; positions and RoPE may differ"
    source_values, export_values = _config_values(source), _config_values(export)
    for key, value in source_values.items():
        _compare_value(key, value, export_values.get(key))
    return (
        f"{len(source_values)} settings as transformers reads them; rope_theta "
        f"{ours.rope.theta:g} for transformers 4 and 5"
    )


def _check_both_spellings(export: str, arch: Architecture) -> None:
    """Checks that transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`) agree."""
    _, raw = read_hf_config(export)
    parameters = raw.get("rope_parameters") or {}
    _compare_value("rope_theta", arch.rope.theta, raw.get("rope_theta"))
    _compare_value("rope_parameters.rope_theta", arch.rope.theta, parameters.get("rope_theta"))
    for key, value in (arch.rope.scaling or {"rope_type": "default"}).items():
        _compare_value(f"rope_parameters.{key}", value, parameters.get(key))
    for key, value in (arch.rope.scaling or {}).items():
        _compare_value(f"rope_scaling.{key}", value, (raw.get("rope_scaling") or {}).get(key))


def _compare_value(name: str, expected: Any, actual: Any) -> None:
    if expected != actual:
        raise CheckFailed(f"{name} is {actual!r} instead of {expected!r}")


def _config_values(folder: str) -> dict[str, Any]:
    from transformers import AutoConfig

    values = AutoConfig.from_pretrained(folder).to_dict()
    return {key: value for key, value in values.items() if key not in NOT_COMPARED}
