"""Every name that a config may give to a part of the model is known to the model."""

from __future__ import annotations

from typing import get_args

from megatron_longpo.config.names import Dtype, LoraTarget
from megatron_longpo.model.lora import TARGETS
from megatron_longpo.model.spec import DTYPES


def test_every_dtype_is_known() -> None:
    assert set(DTYPES) == set(get_args(Dtype))


def test_every_target_of_adapters_is_known() -> None:
    assert set(TARGETS) == set(get_args(LoraTarget))
