"""The manifest of an unfinished output: the settings, model and number of shards it began with."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from megatron_longpo.config.generate import GenerateConfig
from megatron_longpo.data.jsonl import disk_errors
from megatron_longpo.errors import UserError

MANIFEST_FILE = "manifest.json"
FORMAT = 1

WITHOUT_EFFECT = frozenset(
    {
        "documents",
        "output",
        "limit",
        "shard",
        "merge",
        "report",
        "overwrite",
        "num_threads",
        "documents_at_once",
        "batch_size",
        "batch_tokens",
        "server.endpoints",
        "server.api_key_env",
        "server.concurrency",
        "server.timeout_seconds",
        "server.retries",
        "server.outage_minutes",
    }
)
"""Settings that change no example, rounding aside: a run may resume with other values."""

_SAMPLE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What all shards have in common. The first writes it; every other run compares."""

    num_shards: int
    model: str
    """`model_fingerprint` of the model that answers."""
    settings: dict[str, Any]
    """All settings that change an example."""

    @property
    def fingerprint(self) -> str:
        """Returns a hash of what every example depends on."""
        content = json.dumps([self.model, self.settings], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def manifest_of(config: GenerateConfig, *, num_shards: int) -> Manifest:
    settings = _flat(dataclasses.asdict(config))
    kept = {key: settings[key] for key in sorted(settings.keys() - WITHOUT_EFFECT)}
    for key in ("instructions", "chat_template"):
        file = Path(str(kept[key])).expanduser()
        if file.is_file():
            kept[key] = f"{kept[key]} {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
    return Manifest(
        num_shards=num_shards,
        model=model_fingerprint(config.model),
        settings=json.loads(json.dumps(kept)),  # so that they compare with what was read back
    )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def create(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest of a new folder; compares with one that exists.

    Shards may begin at the same time: the first writes it, whole or not at all.
    """
    path = folder / MANIFEST_FILE
    own = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    content = {"format": FORMAT, **dataclasses.asdict(manifest)}
    if not path.exists():
        with disk_errors(path):
            try:
                with open(own, "w", encoding="utf-8") as file:
                    file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                with contextlib.suppress(FileExistsError):
                    os.link(own, path)
            finally:
                own.unlink(missing_ok=True)
    compare(folder, manifest)


def compare(folder: Path, manifest: Manifest) -> None:
    """Raises `UserError` if a folder was begun with another manifest."""
    if not (folder / MANIFEST_FILE).exists():
        return
    begun = read_manifest(folder)
    if begun.num_shards != manifest.num_shards:
        raise UserError(
            f"{folder}: was begun with {begun.num_shards} shards, now {manifest.num_shards}; give "
            f"--shard i/{begun.num_shards}, or another output"
        )
    for key in sorted(begun.settings.keys() | manifest.settings.keys()):
        was, now = begun.settings.get(key), manifest.settings.get(key)
        if was != now:
            raise UserError(
                f"{folder}: was made with other settings: {key} was {_short(was)}, now "
                f"{_short(now)}; give --overwrite to begin anew or choose another output"
            )
    if begun.model != manifest.model:
        raise UserError(
            f"{folder}: was begun with another model in model "
            f"({manifest.settings.get('model')}); give --overwrite to begin anew or choose another "
            "output"
        )


def read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") == FORMAT:
            return Manifest(**content)
    except (OSError, UnicodeDecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); remove {folder} to begin anew"
        ) from error
    raise UserError(f"{path}: was written by another version; remove {folder} to begin anew")


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"...{text[-57:]}"  # paths differ at their end


def model_fingerprint(model: str) -> str:
    """Returns a hash that tells models apart.

    It covers a folder's config, generation config, tokenizer and template, and of each file of
    weights the size and a mebibyte from its beginning, middle and end; of a hub id the name alone.
    """
    folder = Path(model).expanduser()
    digest = hashlib.sha256()
    if not folder.is_dir():
        digest.update(model.encode())
        return digest.hexdigest()[:12]
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".jinja", ".model", ".safetensors", ".bin", ".gguf"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for start in sorted({0, max(0, size // 2), max(0, size - _SAMPLE_BYTES)}):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:12]
