from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints_convert.gpt_weights import load_hf_weights
from megatron_longpo.model.architectures import read_architecture
from megatron_longpo.model.spec import build_gpt, transformer_config
from tests.convert.hf_views import hf_named_gradients, hf_named_tensors
from tests.model.attention.plain_attention import PlainAttention, forward_logits
from tools.tiny_models import FAMILIES, make_tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_under_hugging_face_names(
    tmp_path: Path, single_process: Any, family: str
) -> None:
    folder = make_tiny_model(family, tmp_path, tokenizer=False, tied=family == "llama")
    arch = read_architecture(folder)
    ours = build_gpt(arch, transformer_config(arch, dtype="fp32"), core_attention=PlainAttention)
    load_hf_weights(ours, arch, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected_weights = dict(theirs.named_parameters())
    weights = dict(hf_named_tensors(ours, arch))
    assert set(weights) == set(expected_weights)
    for name, weight in expected_weights.items():
        assert torch.equal(weights[name], weight), name
    input_ids = torch.tensor([5, 17, 299, 3, 42, 128])
    targets = torch.tensor([17, 299, 3, 42, 128, 0])
    for logits in (forward_logits(ours, arch, input_ids), theirs(input_ids[None]).logits[0]):
        torch.nn.functional.cross_entropy(logits, targets).backward()
    gradients = dict(hf_named_gradients(ours, arch))
    assert set(gradients) == set(expected_weights)
    for name, weight in expected_weights.items():
        assert weight.grad is not None
        scale = weight.grad.abs().max().item()
        error = (gradients[name] - weight.grad).abs().max().item()
        # The key bias has no true gradient: both sides hold rounding noise there.
        assert error <= 1e-5 * scale + 1e-8, (name, error, scale)
