"""What we export reads in transformers 4.57 as in 5, and what 4.57 has written reads here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints_convert.hf_folder import write_hf_side_files
from checkpoints_convert.hf_to_megatron import run_import
from checkpoints_convert.megatron_to_hf import run_export
from checkpoints_convert.verify import verify
from megatron_longpo.config.convert import ExportConfig, ImportConfig, VerifyConfig
from megatron_longpo.model.architectures import read_architecture
from tests.convert import in_transformers4
from tests.convert.models import LLAMA3_ROPE, MODELS
from tests.torchrun import ROOT
from tools.tiny_models import make_byte_tokenizer, make_tiny_model

MARKER = in_transformers4.MARKER
FOLDER = Path(sys.prefix) / "transformers4"
REQUIREMENTS = "tests/convert/transformers4.txt"


@pytest.fixture(scope="module")
def transformers4() -> Path:
    """The folder that `make setup` puts version 4.57 into."""
    if not (FOLDER / "transformers").is_dir():
        remedy = f"pip install --no-deps --target {FOLDER} -r {REQUIREMENTS}"
        message = f"transformers 4.57 is not in {FOLDER}; make setup puts it there, or: {remedy}"
        # `make test` must not pass without; a user's own environment need not have it.
        if "LONGPO_NEEDS_TRANSFORMERS4" in os.environ:
            pytest.fail(message)
        pytest.skip(message)
    return FOLDER


def run_script(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/convert/in_transformers4.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, single_process: Any) -> dict[str, Path]:
    """Exports of every architecture, as after a training that changed RoPE and positions."""
    folder = tmp_path_factory.mktemp("exports")
    found = {}
    for name, settings in MODELS.items():
        place = folder / name.replace(" ", "-")
        hf = make_tiny_model(folder=place / "hf", **settings)
        if name == "mistral":
            tokenizer = make_byte_tokenizer()
            tokenizer.add_special_tokens({"additional_special_tokens": [MARKER]})
            tokenizer.save_pretrained(hf)
        run_import(ImportConfig(source=hf, destination=str(place / "megatron")))
        arch = read_architecture(hf, rope_theta=2.5e6, max_position_embeddings=8192)
        write_hf_side_files(hf, place / "megatron" / "iter_0000000" / "hf", arch)
        found[name] = place / "out"
        run_export(ExportConfig(source=str(place / "megatron"), destination=str(found[name])))
    return found


@pytest.fixture(scope="module")
def in_version_4(
    transformers4: Path, exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    result = tmp_path_factory.mktemp("read") / "result.pt"
    run_script(transformers4, "read", str(result), *map(str, exports.values()))
    return torch.load(result)


@pytest.mark.parametrize("name", MODELS)
def test_exports_are_the_same_model_in_both_versions(
    in_version_4: dict[str, Any], exports: dict[str, Path], name: str
) -> None:
    assert transformers.__version__.startswith("5.")
    old = in_version_4[str(exports[name])]
    model = AutoModelForCausalLM.from_pretrained(exports[name], dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([in_transformers4.INPUT_IDS])).logits[0]
    assert logits.std() > 0.05, "logits this flat would hide errors"
    torch.testing.assert_close(old["logits"], logits, rtol=0, atol=1e-5)
    assert old["rope_theta"] == model.config.rope_parameters["rope_theta"] == 2.5e6
    assert old["max_position_embeddings"] == model.config.max_position_embeddings == 8192
    scaling = MODELS[name].get("rope_scaling")
    assert old["rope_scaling"] == scaling
    expected = {"rope_type": "default", **(scaling or {}), "rope_theta": 2.5e6}
    assert model.config.rope_parameters == expected
    tokenizer = AutoTokenizer.from_pretrained(exports[name])
    assert old["ids"] == tokenizer(in_transformers4.TEXT)["input_ids"]
    assert (tokenizer.convert_tokens_to_ids(MARKER) in old["ids"]) == (name == "mistral")
    chat = tokenizer.apply_chat_template(in_transformers4.MESSAGES, tokenize=False)
    assert old["chat"] == chat and "1843." in chat
    assert old["eos_token_id"] == 2


def test_folders_of_version_4_pass(
    transformers4: Path, tmp_path: Path, single_process: Any
) -> None:
    run_script(transformers4, "write", str(tmp_path))
    logits = torch.load(tmp_path / "logits.pt")
    assert LLAMA3_ROPE == in_transformers4.LLAMA3_ROPE
    for family, settings in in_transformers4.SETTINGS.items():
        folder = tmp_path / family
        raw = json.loads((folder / "config.json").read_text())
        assert raw["transformers_version"].startswith("4.57.") and "rope_parameters" not in raw
        arch = read_architecture(str(folder))
        assert arch.rope.theta == settings["rope_theta"]
        assert arch.rope.scaling == settings.get("rope_scaling")
        checks = verify(VerifyConfig(source=str(folder), work_dir=str(tmp_path), max_tokens=40))
        assert all(check.passed is not False for check in checks), checks
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            ours = model(torch.tensor([in_transformers4.INPUT_IDS])).logits[0]
        torch.testing.assert_close(ours, logits[family], rtol=0, atol=1e-5)


def test_the_second_version_is_pinned_and_refused_by_nobody(transformers4: Path) -> None:
    lines = (ROOT / REQUIREMENTS).read_text().splitlines()
    pins = dict(line.split("#")[0].strip().split("==") for line in lines if line[:1] != "#")
    for name, version in pins.items():
        assert (transformers4 / f"{name}-{version}.dist-info").is_dir(), "run make setup again"
