"""Hugging Face folders: finds or downloads them, and copies the files beside the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import Architecture, effective_hf_config, read_hf_config

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)
SIDE_FILES = (*TOKENIZER_FILES, "generation_config.json")


def local_hf_folder(folder_or_hub_id: str) -> str:
    """Returns the folder itself, or the folder of a downloaded copy of the hub id."""
    if Path(folder_or_hub_id).expanduser().is_dir():
        return str(Path(folder_or_hub_id).expanduser())
    is_hub_id = folder_or_hub_id.count("/") == 1 and folder_or_hub_id[0] not in "./~"
    if not is_hub_id:
        raise UserError(f"{folder_or_hub_id}: no such folder, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            folder_or_hub_id,
            allow_patterns=["config.json", "model*.safetensors*", *SIDE_FILES],
        )
    except Exception as error:
        # The hub client raises many kinds (offline, gated, unknown, timed out); each of them
        # means that there is no folder to read.
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{folder_or_hub_id}: no such folder, and not available from the hub ({reason})"
        ) from error


def write_hf_side_files(
    hf_source_folder: str | Path,
    destination_folder: str | Path,
    arch: Architecture,
    *,
    dtype: str | None = None,
) -> None:
    """Copies tokenizer, chat template and generation config, and writes the effective config.json.

    The config has the theta, scaling and positions of `arch`, which a policy may have changed.
    `dtype` (torch's name, such as `bfloat16`) replaces the stored one; None keeps it.
    """
    source, destination = Path(hf_source_folder), Path(destination_folder)
    destination.mkdir(parents=True, exist_ok=True)
    copy_files(source, destination, SIDE_FILES)
    _, config = read_hf_config(str(source))
    config = effective_hf_config(config, arch)
    if dtype is not None:
        # transformers 4 and 5 call it differently.
        config["torch_dtype"] = config["dtype"] = dtype
    _write_json(destination / "config.json", config)


def copy_files(source: Path, destination: Path, patterns: Iterable[str]) -> None:
    """Copies matching files and folders; transformers 4 and 5 both read the copied tokenizer."""
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            target = destination / path.name
            if path.is_dir():
                shutil.copytree(path, target, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, target)
    _spell_for_both_versions(destination / "tokenizer_config.json")


def _spell_for_both_versions(tokenizer_config: Path) -> None:
    """Replaces keys of transformers 5 by those of version 4, which version 5 reads too."""
    if not tokenizer_config.is_file():
        return
    try:
        stored = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{tokenizer_config}: not valid JSON ({error})") from error
    older = dict(stored)
    if older.get("tokenizer_class") == "TokenizersBackend":
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
        older.pop("backend", None)
    if isinstance(older.get("extra_special_tokens"), list):
        older["additional_special_tokens"] = older.pop("extra_special_tokens")
    if older != stored:
        _write_json(tokenizer_config, older)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
