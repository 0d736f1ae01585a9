from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import (
    FAMILIES,
    effective_hf_config,
    read_architecture,
)
from megatron_longpo.model.rope_config import ROPE_KEYS
from tests.convert.models import MODELS
from tests.torchrun import ROOT

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}


def write(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def of_family(name: str, **changes: Any) -> dict[str, Any]:
    return {**LLAMA, "architectures": [name], **changes}


def test_reads_a_llama_config(tmp_path: Path) -> None:
    arch = read_architecture(write(tmp_path, LLAMA))
    assert (arch.family, arch.num_layers, arch.hidden_size, arch.ffn_hidden_size) == (
        "llama",
        2,
        32,
        48,
    )
    assert (arch.num_heads, arch.num_kv_heads, arch.head_dim, arch.vocab_size) == (4, 2, 8, 300)
    assert arch.norm_eps == 1e-5
    assert arch.tied_embeddings and not arch.qkv_bias and not arch.qk_norm
    assert arch.rope.theta == 100000.0 and arch.rope.scaling is None
    assert arch.max_position_embeddings == 4096


def test_families_differ_in_bias_norm_and_defaults(tmp_path: Path) -> None:
    without_heads = {
        key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "head_dim")
    }
    llama = read_architecture(write(tmp_path, without_heads))
    assert llama.num_kv_heads == 4
    qwen2 = read_architecture(write(tmp_path, of_family("Qwen2ForCausalLM")))
    assert qwen2.qkv_bias and not qwen2.qk_norm
    qwen3 = read_architecture(write(tmp_path, of_family("Qwen3ForCausalLM")))
    assert qwen3.qk_norm and not qwen3.qkv_bias and qwen3.head_dim == 128
    mistral = read_architecture(
        write(tmp_path, of_family("MistralForCausalLM", sliding_window=None, head_dim=16))
    )
    assert mistral.family == "mistral" and mistral.head_dim == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM.*supported: LlamaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not supported"),
        ({"hidden_act": "gelu"}, r"hidden_act \(gelu\)"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_layers": 2, "num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "must be divisible"),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 4096},
            r"sliding_window \(4096\)",
        ),
        ({"architectures": ["MistralForCausalLM"]}, r"sliding_window \(4096\)"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 9,
            },
            r"sliding_window \(9\)",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window"),
    ],
)
def test_refuses_what_is_not_modelled(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_architecture(write(tmp_path, {**LLAMA, **change}))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_window_that_is_switched_off_is_no_window(tmp_path: Path) -> None:
    config = of_family("Qwen2ForCausalLM", use_sliding_window=False, sliding_window=32768)
    assert read_architecture(write(tmp_path, config)).family == "qwen2"


def test_refuses_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        read_architecture(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_architecture(str(tmp_path))


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}, LLAMA3])
def test_effective_config_reads_back_as_the_same_model(
    tmp_path: Path, scaling: dict[str, Any] | None
) -> None:
    arch = read_architecture(
        write(tmp_path, {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 2}}),
        rope_theta=1e7,
        rope_scaling=scaling or {"rope_type": "default"},
        max_position_embeddings=65536,
    )
    config = effective_hf_config(LLAMA, arch)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e7
    assert config["rope_scaling"] == scaling
    assert read_architecture(write(tmp_path, config)) == arch


def test_every_family_and_scaling_is_tried_and_documented() -> None:
    assert {settings["family"] for settings in MODELS.values()} == {
        family.name for family in FAMILIES.values()
    }
    scalings = [settings.get("rope_scaling") or {} for settings in MODELS.values()]
    assert {scaling["rope_type"] for scaling in scalings if scaling} == set(ROPE_KEYS)
    page = (ROOT / "docs/architectures.md").read_text(encoding="utf-8")
    for name in (*FAMILIES, *ROPE_KEYS):
        assert f"`{name}`" in page, name
