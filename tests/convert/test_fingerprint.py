from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert.fingerprint import weights_fingerprint
from tools.tiny_models import make_tiny_model


def make(folder: Path, **changes: Any) -> str:
    return make_tiny_model("llama", folder, tokenizer=False, **changes)


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
