"""Fingerprints know the models of version 0.1, and tell others apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert.hf_weights import HfWeights
from megatron_longpo.data.model_fingerprints import (
    file_hashes,
    folder_fingerprint,
    tensors_fingerprint,
)
from tools.tiny_models import make_tiny_model


def make(folder: Path, **changes: Any) -> str:
    return make_tiny_model("llama", folder, tokenizer=False, **changes)


def weights_fingerprint(folder: str) -> str:
    return tensors_fingerprint(HfWeights(folder).files)


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """A folder whose fingerprints are those that version 0.1 gave it."""
    folder = tmp_path / "known"
    folder.mkdir()
    matrix = torch.arange(4096, dtype=torch.float32).view(64, 64)
    save_file(
        {"a.weight": matrix, "b.weight": (matrix[:3] + 0.5).bfloat16()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps({"vocab_size": 64}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("not read")
    return folder


def test_values_are_those_of_version_0_1(known: Path) -> None:
    """As in lora.json, in manifests of shards and in cache.json that 0.1 has written."""
    assert weights_fingerprint(str(known)) == "383ecbb9fe90a9cade75e8222de9d09a"
    assert folder_fingerprint(str(known)) == "8c3181d6a4aa"
    assert folder_fingerprint("org/model") == "c87c0c64d2fb"
    files = [known / name for name in ("model.safetensors", "tokenizer.json")]
    assert file_hashes(files, known) == {
        "model.safetensors": "274e645643ed4be9b5327365baf43d10",
        "tokenizer.json": "2afb9b83f9314e5d029766197f539792",
    }


def test_it_knows_weights_wherever_they_lie(tmp_path: Path) -> None:
    first = weights_fingerprint(make(tmp_path / "a"))
    assert len(first) == 32
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert weights_fingerprint(str(tmp_path / "b")) == first
    sharded = make(tmp_path / "c", max_shard_size="30KB")
    assert len(list(Path(sharded).glob("*.safetensors"))) > 1
    assert weights_fingerprint(sharded) == first


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"dtype": torch.bfloat16}, {"layers": 1}, {"vocab_size": 301}]
)
def test_other_weights_have_another(changes: dict[str, Any], tmp_path: Path) -> None:
    first = weights_fingerprint(make(tmp_path / "a"))
    assert weights_fingerprint(make(tmp_path / "b", **changes)) != first


def test_one_trained_matrix_shows(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", hidden=64, ffn=256)
    first = weights_fingerprint(folder)
    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.001
    save_file(tensors, path, metadata={"format": "pt"})
    assert weights_fingerprint(folder) != first
