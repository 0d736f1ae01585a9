from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from checkpoints_convert.gpt_weights import load_hf_weights
from checkpoints_convert.hf_folder import write_hf_side_files
from checkpoints_convert.hf_to_megatron import NoAttention, run_import
from checkpoints_convert.megatron_to_hf import parse_size, run_export
from checkpoints_convert.safetensors_writer import write_safetensors
from megatron_longpo.config.convert import ExportConfig, ImportConfig
from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import read_architecture
from megatron_longpo.model.spec import build_gpt, transformer_config
from tests.convert.models import MODELS
from tools.tiny_models import make_tiny_model


def read_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        stored = load_file(path)
        assert not set(stored) & set(tensors), "a tensor is in two files"
        tensors.update(stored)
    return tensors


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_import_then_export_is_bitwise_the_same(
    tmp_path: Path, single_process: Any, name: str, dtype: torch.dtype
) -> None:
    settings = MODELS[name]
    tied = settings.get("tied", False)
    # The embedding alone fills the first file.
    limit = 300 * 32 * dtype.itemsize
    hf = make_tiny_model(
        folder=tmp_path / "hf", dtype=dtype, max_shard_size="20KB", tokenizer=False, **settings
    )
    assert (Path(hf) / "model.safetensors.index.json").is_file()
    run_import(ImportConfig(source=hf, destination=str(tmp_path / "megatron")))
    run_export(
        ExportConfig(
            source=str(tmp_path / "megatron"),
            destination=str(tmp_path / "out"),
            max_shard_size=str(limit),
        )
    )
    expected = read_tensors(hf)
    assert ("lm_head.weight" in expected) is not tied
    assert_same(read_tensors(tmp_path / "out"), expected)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files and len(files) > 1
    total = sum(tensor.numel() * tensor.itemsize for tensor in expected.values())
    assert index["metadata"]["total_size"] == total
    assert (
        max(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) < limit + 5000
    )


def test_exported_folder_loads_in_transformers(tmp_path: Path, single_process: Any) -> None:
    hf = make_tiny_model("qwen2", tmp_path / "hf")
    megatron = tmp_path / "megatron"
    run_import(ImportConfig(source=hf, destination=str(megatron)))
    assert sorted(path.name for path in megatron.iterdir()) == [
        "iter_0000000",
        "latest_checkpointed_iteration.txt",
    ]
    assert (megatron / "latest_checkpointed_iteration.txt").read_text().strip() == "0"
    out = tmp_path / "out"
    run_export(ExportConfig(source=str(megatron / "iter_0000000"), destination=str(out)))
    assert (out / "model.safetensors").is_file() and (out / "generation_config.json").is_file()
    input_ids = torch.tensor([[5, 17, 299, 3]])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(hf)(input_ids).logits
        actual = AutoModelForCausalLM.from_pretrained(out)(input_ids).logits
    assert torch.equal(actual, expected)
    messages = [{"role": "user", "content": "Grüße"}]
    texts = [
        AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
        for folder in (hf, out)
    ]
    assert texts[0] == texts[1] == "<|im_start|>user\nGrüße<|im_end|>\n"


def test_a_changed_theta_is_in_the_exported_config(tmp_path: Path, single_process: Any) -> None:
    hf = make_tiny_model("llama", tmp_path / "hf")
    megatron = tmp_path / "megatron"
    run_import(ImportConfig(source=hf, destination=str(megatron)))
    # What training does at each checkpoint.
    arch = read_architecture(hf, rope_theta=2.5e6, max_position_embeddings=131072)
    write_hf_side_files(hf, megatron / "iter_0000000" / "hf", arch)
    run_export(ExportConfig(source=str(megatron), destination=str(tmp_path / "out")))
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 2.5e6
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.rope_parameters["rope_theta"] == 2.5e6
    assert config.max_position_embeddings == 131072


@pytest.mark.parametrize("where", ["import", "export"])
def test_dtype_is_converted_where_asked(tmp_path: Path, single_process: Any, where: str) -> None:
    hf = make_tiny_model("qwen3", tmp_path / "hf", tokenizer=False)
    megatron, out = str(tmp_path / "megatron"), tmp_path / "out"
    on_import, on_export = ("bf16", None) if where == "import" else (None, "bf16")
    run_import(ImportConfig(source=hf, destination=megatron, dtype=on_import))  # type: ignore[arg-type]
    run_export(ExportConfig(source=megatron, destination=str(out), dtype=on_export))  # type: ignore[arg-type]
    expected = {name: tensor.bfloat16() for name, tensor in read_tensors(hf).items()}
    assert_same(read_tensors(out), expected)
    raw = json.loads((out / "config.json").read_text())
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16"


def test_a_destination_is_replaced_only_when_asked(tmp_path: Path, single_process: Any) -> None:
    hf = make_tiny_model("llama", tmp_path / "hf", tokenizer=False)
    other = make_tiny_model("llama", tmp_path / "other", tokenizer=False, seed=1)
    megatron, out = str(tmp_path / "megatron"), str(tmp_path / "out")
    run_import(ImportConfig(source=hf, destination=megatron))
    run_export(ExportConfig(source=megatron, destination=out))
    with pytest.raises(UserError, match="--overwrite"):
        run_import(ImportConfig(source=other, destination=megatron))
    with pytest.raises(UserError, match="--overwrite"):
        run_export(ExportConfig(source=megatron, destination=out))
    assert_same(read_tensors(out), read_tensors(hf))
    run_import(ImportConfig(source=other, destination=megatron, overwrite=True))
    run_export(ExportConfig(source=megatron, destination=out, overwrite=True))
    assert_same(read_tensors(out), read_tensors(other))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron", "other", "out"]


def test_overwrite_does_not_replace_training_results(tmp_path: Path, single_process: Any) -> None:
    hf = make_tiny_model("llama", tmp_path / "hf", tokenizer=False)
    megatron = tmp_path / "megatron"
    run_import(ImportConfig(source=hf, destination=str(megatron)))
    (megatron / "iter_0000100").mkdir()
    with pytest.raises(UserError, match="holds other things"):
        run_import(ImportConfig(source=hf, destination=str(megatron), overwrite=True))
    assert (megatron / "iter_0000000" / ".metadata").is_file()


def test_export_refuses_what_is_no_checkpoint_or_another_models(
    tmp_path: Path, single_process: Any
) -> None:
    with pytest.raises(UserError, match="no torch_dist checkpoint"):
        run_export(ExportConfig(source=str(tmp_path), destination=str(tmp_path / "out")))
    hf = make_tiny_model("qwen3", tmp_path / "hf", tokenizer=False)
    megatron = tmp_path / "megatron"
    run_import(ImportConfig(source=hf, destination=str(megatron)))
    config_path = megatron / "iter_0000000" / "hf" / "config.json"
    config = json.loads(config_path.read_text())
    for change, message in (
        ({"num_hidden_layers": 3}, "has shape"),
        ({"vocab_size": 500}, "has shape"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "linear_qkv.bias is missing"),
        ({"architectures": ["LlamaForCausalLM"]}, "q_layernorm.weight has no place"),
    ):
        config_path.write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=message):
            run_export(ExportConfig(source=str(megatron), destination=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_a_run_that_diverged_is_not_exported(
    tmp_path: Path, single_process: Any
) -> None:
    hf = make_tiny_model("llama", tmp_path / "hf", tokenizer=False)
    arch = read_architecture(hf)
    model = build_gpt(arch, transformer_config(arch, dtype="fp32"), core_attention=NoAttention)
    load_hf_weights(model, arch, hf)
    with torch.no_grad():
        model.decoder.layers[1].mlp.linear_fc2.weight[5, 7] = float("nan")
    iteration = tmp_path / "run" / "iter_0000003"
    iteration.mkdir(parents=True)
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(iteration))
    write_hf_side_files(hf, iteration / "hf", arch)
    with pytest.raises(UserError, match=r"linear_fc2\.weight of layer 1 holds NaN") as caught:
        run_export(ExportConfig(source=str(iteration), destination=str(tmp_path / "out")))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_files_are_laid_out_as_the_library_lays_them_out(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    path = tmp_path / "x.safetensors"
    # A view with gaps, as a split of joined weights is.
    spread = torch.zeros(7, 2)
    spread[:, 0] = tensors["a"]
    write_safetensors(path, shapes, iter([tensors["b"], spread[:, 0]]), dtype=torch.float32)
    assert_same(load_file(path), tensors)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    assert header_bytes % 8 == 0
    assert path.stat().st_size == 8 + header_bytes + 22 * 4


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1500000), ("12", 12)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5 GiB", "-1GB", "0"])
def test_sizes_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="max_shard_size"):
        parse_size(text)
