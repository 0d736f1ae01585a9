from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as hf_apply

from megatron_longpo.model.architectures import effective_hf_config, read_architecture
from megatron_longpo.model.rope import attention_scale, inverse_frequencies, rotary_angles
from tools.tiny_models import FAMILIES, make_tiny_model

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    # Wavelengths of 64 frequencies fall on all three sides of these bounds.
    {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    {
        "rope_type": "yarn",
        "factor": 8,
        "original_max_position_embeddings": 512,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "truncate": False,
        "mscale": 1.5,
        "mscale_all_dim": 0.5,
    },
    # The whole range between the bounds is one dimension.
    {
        "rope_type": "yarn",
        "factor": 2.5,
        "original_max_position_embeddings": 64,
        "beta_fast": 1.001,
        "beta_slow": 1.0,
        "truncate": False,
        "attention_factor": 1.25,
        "mscale": 2.0,
        "mscale_all_dim": 1.0,
    },
]


def scaling_name(scaling: dict[str, Any]) -> str:
    return f"{scaling['rope_type']}_{len(scaling)}"


@pytest.mark.parametrize("theta", [None, 1e7])
@pytest.mark.parametrize("scaling", SCALINGS, ids=scaling_name)
@pytest.mark.parametrize("family", FAMILIES)
def test_frequencies_are_those_of_transformers(
    tmp_path: Path, family: str, scaling: dict[str, Any], theta: float | None
) -> None:
    folder = make_tiny_model(
        family, tmp_path, layers=1, head_dim=128, rope_scaling=scaling, tokenizer=False
    )
    arch = read_architecture(folder, rope_theta=theta)
    config = AutoConfig.from_pretrained(folder)
    if theta is not None:
        config.rope_parameters["rope_theta"] = theta
    with torch.device("meta"):
        rotary = type(AutoModelForCausalLM.from_config(config).model.rotary_emb)
    expected = rotary(config)
    assert inverse_frequencies(arch).dtype == torch.float32
    assert torch.equal(inverse_frequencies(arch), expected.inv_freq)
    factor = expected.attention_scaling
    if scaling["rope_type"] == "yarn":
        assert factor > 1
    scale = attention_scale(arch)
    assert scale == (None if factor == 1 else pytest.approx(factor**2 * 128**-0.5, rel=1e-12))


@pytest.mark.parametrize("scaling", SCALINGS[2:], ids=scaling_name)
def test_both_spellings_in_an_exported_config_give_the_policys_frequencies(
    tmp_path: Path, scaling: dict[str, Any]
) -> None:
    folder = make_tiny_model("llama", tmp_path, layers=1, tokenizer=False)
    arch = read_architecture(
        folder, rope_theta=3e6, rope_scaling=scaling, max_position_embeddings=4096
    )
    original = AutoConfig.from_pretrained(folder)
    config = type(original).from_dict(effective_hf_config(original.to_dict(), arch))
    with torch.device("meta"):
        rotary = type(AutoModelForCausalLM.from_config(config).model.rotary_emb)
    assert torch.equal(rotary(config).inv_freq, inverse_frequencies(arch))
    exported = effective_hf_config(original.to_dict(), arch)
    # transformers 4 reads one of them, transformers 5 the other.
    assert exported["rope_scaling"].items() <= exported["rope_parameters"].items()
    assert exported["rope_scaling"].keys() == scaling.keys()


def test_angles_rotate_as_transformers_does_at_any_position(single_process: Any) -> None:
    position_ids = torch.tensor([0, 1, 2, 500, 131071, 3])
    inv_freq = 1.0 / (1e6 ** (torch.arange(0, 16, 2).float() / 16))
    query = torch.randn(6, 1, 3, 16, generator=torch.Generator().manual_seed(0))
    angles = rotary_angles(inv_freq, position_ids)
    assert angles.shape == (6, 1, 1, 16) and angles.dtype == torch.float32
    config = TransformerConfig(num_layers=1, hidden_size=48, num_attention_heads=3)
    ours = apply_rotary_pos_emb(query, angles, config)
    heads_first = query.permute(1, 2, 0, 3)
    frequencies = position_ids[:, None].float() * inv_freq
    cos = torch.cat((frequencies, frequencies), -1).cos()[None]
    sin = torch.cat((frequencies, frequencies), -1).sin()[None]
    expected, _ = hf_apply(heads_first, heads_first, cos, sin)
    assert torch.equal(ours.permute(1, 2, 0, 3), expected)
