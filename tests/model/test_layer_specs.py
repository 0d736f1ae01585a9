from __future__ import annotations

from typing import Any

import pytest
import torch

from checkpoints_convert.mapping import tensor_rules
from megatron_longpo.errors import UserError
from megatron_longpo.model.layer_specs import choose_layers
from tests.model.test_norm import TINY

GPU_RUN: dict[str, Any] = {
    "device": torch.device("cuda"),
    "dtype": torch.bfloat16,
    "has_lora": False,
}


def importable(monkeypatch: pytest.MonkeyPatch, failure: Exception | None = None) -> None:
    def import_module(name: str) -> object:
        assert name == "transformer_engine.pytorch"
        if failure is not None:
            raise failure
        return object()

    monkeypatch.setattr("importlib.import_module", import_module)


def test_a_gpu_in_bf16_takes_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    importable(monkeypatch)
    assert choose_layers("auto", **GPU_RUN).kind == "te"
    assert choose_layers("local", **GPU_RUN).kind == "local"


@pytest.mark.parametrize(
    ("change", "failure", "reason"),
    [
        ({"device": torch.device("cpu")}, None, "it needs a GPU"),
        ({"dtype": torch.float32}, None, "model.dtype is fp32"),
        ({"has_lora": True}, None, "adapters are put on Megatron's own linear layers"),
        ({}, ModuleNotFoundError("no"), "the package transformer_engine is not installed"),
        ({}, OSError("libcudnn.so.9:\nmissing"), "it cannot be imported (libcudnn.so.9: missing)"),
    ],
)
def test_what_stands_in_the_way_is_said(
    change: dict[str, Any],
    failure: Exception | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    importable(monkeypatch, failure)
    chosen = choose_layers("auto", **{**GPU_RUN, **change})
    assert chosen.kind == "local" and "; not te: " in chosen.line and reason in chosen.line
    with pytest.raises(UserError, match=r"model\.layers \(te\): .*; use auto or local") as refused:
        choose_layers("te", **{**GPU_RUN, **change})
    assert reason in str(refused.value)


def test_fused_norms_go_by_the_names_of_checkpoints() -> None:
    names = {rule.megatron_name: rule.fused_name for rule in tensor_rules(TINY)}
    layer = "decoder.layers.0."
    changed = {name: fused for name, fused in names.items() if name != fused}
    assert changed == {
        f"{layer}input_layernorm.weight": f"{layer}self_attention.linear_qkv.layer_norm_weight",
        f"{layer}pre_mlp_layernorm.weight": f"{layer}mlp.linear_fc1.layer_norm_weight",
    }
