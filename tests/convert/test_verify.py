from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert import checkpoint_weights, verify_logits
from checkpoints_convert.hf_folder import write_hf_side_files
from checkpoints_convert.hf_to_megatron import run_import
from checkpoints_convert.mapping import TensorRule, to_hf
from checkpoints_convert.megatron_to_hf import run_export
from checkpoints_convert.verify import Check, verify
from checkpoints_convert.verify_tokenizer import CONVERSATIONS
from megatron_longpo.cli import main
from megatron_longpo.config.convert import ExportConfig, ImportConfig, VerifyConfig
from megatron_longpo.errors import UserError
from megatron_longpo.model import rope
from megatron_longpo.model.architectures import Architecture, read_architecture
from tests.convert.models import MODELS
from tools.tiny_models import make_tiny_model

NAMES = ["weights", "config", "tokenizer", "chat template", "logits"]


def results(checks: list[Check]) -> dict[str, bool | None]:
    return {check.name: check.passed for check in checks}


def quick(folder: str, work: Path, **settings: Any) -> VerifyConfig:
    return VerifyConfig(source=folder, work_dir=str(work), max_tokens=40, **settings)


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_passes(tmp_path: Path, single_process: Any, name: str) -> None:
    folder = make_tiny_model(folder=tmp_path / "hf", max_shard_size="60KB", **MODELS[name])
    (tmp_path / "work").mkdir()
    checks = verify(quick(folder, tmp_path / "work"))
    assert [check.name for check in checks] == NAMES
    assert all(check.passed for check in checks), checks
    assert not any((tmp_path / "work").iterdir()), "temporary files were left"


def test_half_precision_and_bytes_in_place_of_a_tokenizer(
    tmp_path: Path, single_process: Any
) -> None:
    folder = make_tiny_model("qwen2", tmp_path / "hf", tokenizer=False, dtype=torch.bfloat16)
    passed = results(verify(quick(folder, tmp_path)))
    assert passed == {
        "weights": True,
        "config": True,
        "tokenizer": None,
        "chat template": None,
        "logits": True,
    }
    half = make_tiny_model("qwen2", tmp_path / "half", tokenizer=False, dtype=torch.float16)
    with pytest.raises(UserError, match="--dtype"):
        verify(quick(half, tmp_path))
    assert results(verify(quick(half, tmp_path, dtype="fp32")))["weights"]


def test_output_layer_that_transformers_ignores(tmp_path: Path, single_process: Any) -> None:
    folder = make_tiny_model("llama", tmp_path / "hf", tied=True)
    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    assert all(check.passed for check in verify(quick(folder, tmp_path)))
    trained = make_tiny_model("llama", tmp_path / "trained", tied=True, seed=1)
    assert results(verify(quick(folder, tmp_path, export=trained)))["trained from source"]
    wider = make_tiny_model("llama", tmp_path / "wider", tied=True, ffn=64)
    checks = {c.name: c for c in verify(quick(folder, tmp_path, export=wider))}
    detail = "shape of model.layers.0.mlp.down_proj.weight is [32, 64] instead of [32, 48]"
    assert checks["trained from source"].detail == detail


# What is wrong must be found, by the check that looks for it.


def swapped_keys(rule: TensorRule, arch: Architecture, tensor: torch.Tensor) -> list[torch.Tensor]:
    parts = to_hf(rule, arch, tensor)
    return [parts[0], parts[2], parts[1]] if rule.kind == "qkv" else parts


def negative_zero(rule: TensorRule, arch: Architecture, tensor: torch.Tensor) -> list[torch.Tensor]:
    if rule.hf_names[0] == "model.norm.weight":
        tensor = torch.where(tensor == 0, -0.0, tensor)
    return to_hf(rule, arch, tensor)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (swapped_keys, r"model\.layers\.0\.self_attn\.k_proj\.weight differs in \d+ of 512 .* to "),
        (negative_zero, r"model\.norm\.weight differs"),
    ],
)
def test_an_export_that_mixes_weights_up_is_caught(
    tmp_path: Path,
    single_process: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wrong: Callable[..., Any],
    message: str,
) -> None:
    folder = make_tiny_model("llama", tmp_path / "hf")
    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = 0.0
    save_file(tensors, path, metadata={"format": "pt"})
    monkeypatch.setattr(checkpoint_weights, "to_hf", wrong)
    assert main(["convert", "verify", folder, "--json", "--logits", "false"]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert not report["passed"]
    failed = [check for check in report["checks"] if check["passed"] is False]
    assert [check["name"] for check in failed] == ["weights"]
    line = captured.err.strip().splitlines()[-1]
    assert line == f"longpo: weights: {failed[0]['detail']}"
    assert re.search(message, line), line


def test_a_model_that_computes_something_else_is_caught(
    tmp_path: Path, single_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_model("mistral", tmp_path / "hf")
    monkeypatch.setattr(
        verify_logits, "inverse_frequencies", lambda arch: 1.01 * rope.inverse_frequencies(arch)
    )
    checks = {check.name: check for check in verify(quick(folder, tmp_path))}
    assert checks["weights"].passed
    assert not checks["logits"].passed
    assert "text prose, after token" in checks["logits"].detail


def test_logits_that_are_no_numbers_fail(
    tmp_path: Path, single_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_model("mistral", tmp_path / "hf")
    monkeypatch.setattr(
        verify_logits,
        "inverse_frequencies",
        lambda arch: float("nan") * rope.inverse_frequencies(arch),
    )
    assert results(verify(quick(folder, tmp_path)))["logits"] is False


def trained(source: str, folder: Path, **changes: Any) -> str:
    """An export as training leaves it: other weights, another theta."""
    other = make_tiny_model("llama", folder / "other", seed=5, **changes)
    run_import(ImportConfig(source=other, destination=str(folder / "megatron")))
    arch = read_architecture(source, rope_theta=1e7, max_position_embeddings=65536)
    write_hf_side_files(source, folder / "megatron" / "iter_0000000" / "hf", arch)
    run_export(ExportConfig(source=str(folder / "megatron"), destination=str(folder / "out")))
    return str(folder / "out")


def test_a_trained_export_is_compared_with_its_source(tmp_path: Path, single_process: Any) -> None:
    source = make_tiny_model("llama", tmp_path / "hf")
    export = trained(source, tmp_path)
    passed = results(verify(quick(source, tmp_path, export=export)))
    assert passed == dict.fromkeys([*NAMES, "trained from source", "trained config"], True)

    template = Path(export) / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", " <|im_end|>"))
    settings = json.loads((Path(export) / "tokenizer_config.json").read_text())
    settings["eos_token"] = "<|endoftext|>"
    (Path(export) / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((Path(export) / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (Path(export) / "config.json").write_text(json.dumps(config))
    checks = {c.name: c for c in verify(quick(source, tmp_path, export=export))}
    failed = {name for name, check in checks.items() if not check.passed}
    assert failed == {"tokenizer", "chat template", "trained config"}
    assert "eos_token_id is 0 instead of 2" in checks["tokenizer"].detail
    assert "conversation 1: token" in checks["chat template"].detail
    assert checks["trained config"].detail == "norm_eps is 0.5 instead of 1e-06"


def test_a_config_without_both_spellings_of_theta_is_caught(
    tmp_path: Path, single_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from checkpoints_convert import hf_folder

    def only_new(config: dict[str, Any], arch: Architecture) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key != "rope_theta"}

    folder = make_tiny_model("llama", tmp_path / "hf")
    monkeypatch.setattr(hf_folder, "effective_hf_config", only_new)
    checks = {check.name: check for check in verify(quick(folder, tmp_path, logits=False))}
    assert checks["config"].detail == "rope_theta is None instead of 10000.0"
    assert checks["logits"].passed is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": "no-such-file"}, r"text \(no-such-file\): not a readable"),
        ({"work_dir": "no/such/folder"}, r"work_dir \(no/such/folder\): no such folder"),
        ({"export": "no/such"}, "no such folder"),
    ],
)
def test_bad_settings_are_named(
    tmp_path: Path, single_process: Any, settings: dict[str, Any], message: str
) -> None:
    folder = make_tiny_model("llama", tmp_path / "hf")
    with pytest.raises(UserError, match=message):
        verify(VerifyConfig(source=folder, **settings))


def test_own_text_and_a_vocabulary_that_is_too_small(tmp_path: Path, single_process: Any) -> None:
    folder = make_tiny_model("llama", tmp_path / "hf")
    own = tmp_path / "own.txt"
    own.write_text("The harbour master keeps the ledger. " * 5)
    checks = verify(quick(folder, tmp_path, text=str(own)))
    assert "prose, code, own.txt" in checks[-1].detail
    small = make_tiny_model("llama", tmp_path / "small", vocab_size=60, tokenizer=False)
    for path in Path(folder).glob("tokenizer*"):
        os.link(path, Path(small) / path.name)
    with pytest.raises(UserError, match="60 embeddings; they do not belong together"):
        verify(quick(small, tmp_path))


def test_conversations_are_of_several_kinds() -> None:
    roles = [tuple(message["role"] for message in messages) for messages in CONVERSATIONS]
    assert len({len(r) for r in roles}) > 1 and any(r[0] == "system" for r in roles)
