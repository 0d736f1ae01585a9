"""What a reference's fingerprint covers, and what it leaves out."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from megatron_longpo.data.rows.dataset import open_rows
from megatron_longpo.engine.reference_fingerprint import (
    ReferenceFingerprint,
    differences,
    fingerprint_model,
    with_rows,
)
from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import read_architecture
from tests.parity.cases import TinyModel
from tests.parity.harness import Shelf
from tests.reference.cached_runs import cached_config
from tests.training.short_runs import CASE
from tools.tiny_models import make_tiny_model


@pytest.fixture
def folder(shelf: Shelf, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shelf.hf_folder(TinyModel()), tmp_path / "model"))


@pytest.fixture
def fingerprint(shelf: Shelf, folder: Path, tmp_path: Path) -> ReferenceFingerprint:
    return fingerprint_of(shelf, folder)


def fingerprint_of(shelf: Shelf, folder: Path) -> ReferenceFingerprint:
    config = cached_config(shelf, folder.parent / "run")
    return fingerprint_model(config, str(folder), read_architecture(str(folder)))


def test_the_same_files_elsewhere_are_the_same(
    shelf: Shelf, folder: Path, fingerprint: ReferenceFingerprint, tmp_path: Path
) -> None:
    copy = fingerprint_of(shelf, Path(shutil.copytree(folder, tmp_path / "copy")))
    assert copy == fingerprint
    assert copy.short == fingerprint.short
    assert differences(copy, fingerprint) == {}
    assert set(fingerprint.weights) == {"model.safetensors"}
    assert {"tokenizer.json", "chat_template.jinja"} <= set(fingerprint.tokenizer)


def test_config_and_settings_are_those_of_version_0_1(
    fingerprint: ReferenceFingerprint, shelf: Shelf
) -> None:
    """A key more or less, or another name, would make every cache stale."""
    assert fingerprint.config == {
        "family": "llama",
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "vocab_size": 300,
        "norm_eps": 1e-6,
        "tied_embeddings": False,
        "qkv_bias": False,
        "qk_norm": False,
        "rope.theta": 10000.0,
        "rope.scaling": None,
        "rope.max_position_embeddings": 4096,
    }
    assert fingerprint.settings == {
        "model.dtype": "fp32",
        "data.max_length": 2000,
        "data.too_long": "error",
    }


def test_what_does_not_matter_is_left_out(
    shelf: Shelf, folder: Path, fingerprint: ReferenceFingerprint
) -> None:
    path = folder / "config.json"
    contents = json.loads(path.read_text())
    path.write_text(json.dumps({**contents, "transformers_version": "9", "use_cache": False}))
    (folder / "generation_config.json").write_text("{}")
    (folder / "README.md").write_text("new")
    assert fingerprint_of(shelf, folder) == fingerprint


def test_one_byte_of_the_weights_matters(
    shelf: Shelf, folder: Path, fingerprint: ReferenceFingerprint
) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    changed = fingerprint_of(shelf, folder)
    assert differences(fingerprint, changed) == {"weights": "model.safetensors"}
    assert changed.short != fingerprint.short


def test_every_shard_is_hashed(shelf: Shelf, tmp_path: Path) -> None:
    folder = Path(make_tiny_model("llama", tmp_path / "sharded", max_shard_size="20KB"))
    shards = {path.name for path in folder.glob("*.safetensors")}
    assert len(shards) > 2
    before = fingerprint_of(shelf, folder)
    assert set(before.weights) == shards
    last = folder / max(shards)
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    assert differences(before, fingerprint_of(shelf, folder)) == {"weights": last.name}


@pytest.mark.parametrize(
    ("rope", "shown"),
    [
        ({"rope_theta": 5e5}, "rope.theta 10000.0, now 500000.0"),
        (
            {"rope_type": "linear", "factor": 2.0},
            "rope.scaling None, now None; rope.scaling.factor None, now 2.0",
        ),
    ],
)
def test_rope_matters_wherever_config_json_says_it(
    rope: dict[str, object],
    shown: str,
    shelf: Shelf,
    folder: Path,
    fingerprint: ReferenceFingerprint,
) -> None:
    path = folder / "config.json"
    contents = json.loads(path.read_text())
    contents["rope_parameters"].update(rope)
    path.write_text(json.dumps(contents))
    (part, text), *others = differences(fingerprint, fingerprint_of(shelf, folder)).items()
    assert part == "config" and not others
    assert shown.split("; ")[-1] in text


def test_a_tokenizer_file_that_changes_comes_or_goes(
    shelf: Shelf, folder: Path, fingerprint: ReferenceFingerprint
) -> None:
    (folder / "chat_template.jinja").write_text("other")
    (folder / "merges.txt").write_text("new")
    (folder / "tokenizer_config.json").unlink()
    changed = differences(fingerprint, fingerprint_of(shelf, folder))
    assert changed == {"tokenizer": "chat_template.jinja; merges.txt; tokenizer_config.json"}


def test_rows_are_their_content(
    shelf: Shelf, fingerprint: ReferenceFingerprint, tmp_path: Path
) -> None:
    path = Path(shelf.rows_file(CASE))
    copy = tmp_path / "copy.jsonl"
    shutil.copyfile(path, copy)
    ours = with_rows(fingerprint, open_rows(str(path)))
    assert with_rows(fingerprint, open_rows(str(copy))) == ours
    lines = copy.read_text().splitlines()
    copy.write_text("\n".join(lines[::-1]) + "\n")
    assert set(differences(ours, with_rows(fingerprint, open_rows(str(copy))))) == {"rows"}


def test_a_file_that_cannot_be_read_is_named(
    shelf: Shelf, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "vocab.txt").symlink_to(folder / "absent")
    # A dangling link is no file, and is left out as one that is not there.
    assert "vocab.txt" not in fingerprint_of(shelf, folder).tokenizer

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(hashlib, "file_digest", refuse)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
        fingerprint_of(shelf, folder)
