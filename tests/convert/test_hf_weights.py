from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert.gpt_weights import load_hf_weights
from checkpoints_convert.hf_folder import local_hf_folder
from checkpoints_convert.hf_to_megatron import run_import
from megatron_longpo.config.convert import ImportConfig
from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import read_architecture
from megatron_longpo.model.spec import build_gpt, transformer_config
from tests.model.attention.plain_attention import PlainAttention
from tools.tiny_models import make_tiny_model

Tensors = dict[str, torch.Tensor]


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.pop(name)  # type: ignore[return-value]


def put(name: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


def spoil(name: str, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[3] = value

    return change


GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(GATE), f"tensor {GATE} is missing"),
        (drop("lm_head.weight"), "tensor lm_head.weight is missing"),
        (put("model.extra.weight", torch.zeros(2)), "tensor model.extra.weight has no place"),
        (put("model.layers.0.self_attn.q_proj.bias", torch.zeros(32)), "q_proj.bias has no place"),
        (put(GATE, torch.zeros(48, 31)), f"{GATE} has shape .48, 31., .* asks for .48, 32."),
        (put(GATE, torch.zeros(48, 32, dtype=torch.float8_e4m3fn)), "has dtype F8_E4M3"),
        (spoil(GATE, float("nan")), f"{GATE} holds NaN"),
        (spoil("model.norm.weight", float("inf")), "model.norm.weight holds NaN or infinity"),
    ],
    ids=["missing", "no head", "extra", "unmodelled bias", "shape", "float8", "nan", "infinity"],
)
def test_damaged_weights_are_named(
    tmp_path: Path, single_process: Any, change: Callable[[Tensors], None], message: str
) -> None:
    folder = Path(make_tiny_model("llama", tmp_path / "hf", tokenizer=False))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message) as caught:
        run_import(ImportConfig(source=str(folder), destination=str(tmp_path / "megatron")))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"], "a part of a result was left"


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    folder = Path(make_tiny_model("llama", tmp_path, tokenizer=False, max_shard_size="60KB"))
    config = ImportConfig(source=str(folder), destination=str(tmp_path / "megatron"))
    first = sorted(folder.glob("model-*.safetensors"))[0]
    whole = first.read_bytes()
    first.write_bytes(whole[:5])
    with pytest.raises(UserError, match=f"{first.name}: not a readable safetensors file"):
        run_import(config)
    first.unlink()
    with pytest.raises(UserError, match=f"{first.name}: named in .*index.json but missing"):
        run_import(config)
    first.write_bytes(whole)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    wrong = next(name for name, file in weight_map.items() if file != first.name)
    index.write_text(json.dumps({"weight_map": {**weight_map, wrong: first.name}}))
    with pytest.raises(UserError, match=f"tensor {wrong} is missing, though the index"):
        run_import(config)
    index.unlink()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match=r"no model.safetensors and no"):
        run_import(config)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"\.bin files only; convert them to safetensors"):
        run_import(config)


def test_tensors_that_transformers_ignores_are_ignored(tmp_path: Path, single_process: Any) -> None:
    folder = make_tiny_model("llama", tmp_path / "hf", tied=True, tokenizer=False)
    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = torch.full((300, 32), 7.0)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, path, metadata={"format": "pt"})
    arch = read_architecture(folder)
    model = build_gpt(arch, transformer_config(arch, dtype="fp32"), core_attention=PlainAttention)
    load_hf_weights(model, arch, folder)
    assert torch.equal(
        model.embedding.word_embeddings.weight[:300], tensors["model.embed_tokens.weight"]
    )


def test_weights_of_half_precision_ask_for_a_dtype(tmp_path: Path, single_process: Any) -> None:
    hf = make_tiny_model("llama", tmp_path / "hf", tokenizer=False, dtype=torch.float16)
    destination = str(tmp_path / "megatron")
    with pytest.raises(UserError, match=r"torch.float16.*--dtype bf16"):
        run_import(ImportConfig(source=hf, destination=destination))
    run_import(ImportConfig(source=hf, destination=destination, dtype="fp32"))


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "nowhere"])
def test_a_source_that_is_neither_folder_nor_hub_id_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="no such folder, and not a hub id"):
        local_hf_folder(name)
