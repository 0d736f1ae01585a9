from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from checkpoints_convert.gpt_weights import load_hf_weights
from checkpoints_convert.hf_to_megatron import NoAttention, run_import
from megatron_longpo.config.convert import ImportConfig
from megatron_longpo.model.architectures import Architecture, read_architecture
from megatron_longpo.model.spec import build_gpt, padded_vocab_size, transformer_config
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.training import loop
from tests.parity.cases import TinyModel
from tests.parity.harness import Shelf
from tests.torchrun import torchrun
from tests.training.short_runs import CASE, short_config
from tools.tiny_models import make_tiny_model

CUTS = {
    "embedding.word_embeddings.weight": 0,
    "decoder.layers.0.input_layernorm.weight": None,
    "decoder.layers.0.self_attention.linear_qkv.weight": 0,
    "decoder.layers.1.self_attention.linear_proj.weight": 1,
    "decoder.layers.1.self_attention.q_layernorm.weight": None,
    "decoder.layers.1.mlp.linear_fc2.weight": 1,
    "decoder.final_layernorm.weight": None,
    "output_layer.weight": 0,
}
"""Parameters to look at, with the dimension that tensor-parallel ranks cut; None = not cut."""


def check_loads(checkpoint: Path, model: Any, arch: Architecture, folder: Path) -> None:
    """Plain Megatron-Core, on two ranks, must read the tensors of `model` from `checkpoint`."""
    # Under TP2 the vocabulary is padded further, to a multiple of 256; here both are 512.
    assert padded_vocab_size(arch, 1) == padded_vocab_size(arch, 2) == 512
    parameters = dict(model.named_parameters())
    expected = {
        "config": {
            "num_layers": arch.num_layers,
            "hidden_size": arch.hidden_size,
            "ffn_hidden_size": arch.ffn_hidden_size,
            "num_attention_heads": arch.num_heads,
            "num_query_groups": arch.num_kv_heads,
            "kv_channels": arch.head_dim,
            "layernorm_epsilon": arch.norm_eps,
            "qk_layernorm": arch.qk_norm,
        },
        "padded_vocab_size": 512,
        "tied": arch.tied_embeddings,
        "tensors": {name: (parameters[name].detach(), cut) for name, cut in CUTS.items()},
    }
    expected_file = folder / "expected.pt"
    torch.save(expected, expected_file)
    result = torchrun(
        "tests/convert/plain_megatron.py", str(checkpoint), str(expected_file), ranks=2
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("same: ") == len(CUTS), result.stdout


def test_plain_gpt_model_loads_an_import_under_tp2(tmp_path: Path, single_process: Groups) -> None:
    source = make_tiny_model("qwen3", tmp_path / "hf", vocab_size=500)
    destination = tmp_path / "megatron"
    run_import(ImportConfig(source=source, destination=str(destination)))
    arch = read_architecture(source)
    model = build_gpt(arch, transformer_config(arch, dtype="fp32"), core_attention=NoAttention)
    load_hf_weights(model, arch, source)
    check_loads(destination / "iter_0000000", model, arch, tmp_path)


def test_plain_gpt_model_loads_a_trained_checkpoint_under_tp2(
    shelf: Shelf, tmp_path: Path, single_process: Groups
) -> None:
    case = replace(CASE, name="plain", policy=TinyModel(family="qwen3", vocab_size=500))
    run = loop.prepare(short_config(shelf, tmp_path / "run", case=case, steps=2))
    loop.train(run)
    (chunk,) = unwrap_model(run.model)
    checkpoint = tmp_path / "run" / "checkpoints" / "iter_0000002"
    check_loads(checkpoint, chunk.policy, run.sources.policy, tmp_path)


def test_the_script_imports_nothing_of_ours() -> None:
    text = (Path(__file__).parent / "plain_megatron.py").read_text(encoding="utf-8")
    for package in ("megatron_longpo", "checkpoints_convert", "tests.", "tools."):
        assert f"import {package}" not in text and f"from {package}" not in text
