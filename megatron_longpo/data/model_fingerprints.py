"""Fingerprints of models on disk: three rules, each with its cost and what it can tell apart.

| function              | reads                          | does not see                          |
|-----------------------|--------------------------------|---------------------------------------|
| `tensors_fingerprint` | 4 KiB of every tensor          | how tensors are spread over files     |
| `folder_fingerprint`  | 3 MiB of every file of weights | a change between the samples          |
| `file_hashes`         | every byte                     | nothing                               |

Files on users' disks hold these values: the first is in `lora.json` of checkpoints, the second in
manifests of generated shards, the third in `cache.json` of reference caches. A rule that changes
its values makes those files unusable.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_longpo.errors import UserError

TENSOR_SAMPLE_BYTES = 4096
"""Read from the middle of each tensor."""
FILE_SAMPLE_BYTES = 1 << 20
"""Read from the beginning, the middle and the end of each file."""
MODEL_SUFFIXES = (".json", ".jinja", ".model", ".safetensors", ".bin", ".gguf")
"""Files of a model's folder: config, tokenizer, template and weights."""
HASH_THREADS = 8
"""Files that are hashed at once; hashing lets other threads run."""


def tensors_fingerprint(files: Mapping[str, Path]) -> str:
    """Returns 32 hexadecimal digits for the tensors of safetensors files.

    It covers each tensor's name, dtype, shape and the bytes in its middle. Training changes every
    matrix everywhere, so a sample is enough.

    Args:
        files: the file of each tensor, by the tensor's name.
    """
    headers: dict[Path, tuple[dict[str, Any], int]] = {}
    digest = hashlib.sha256()
    for name in sorted(files):
        path = files[name]
        if path not in headers:
            headers[path] = _header(path)
        header, data_start = headers[path]
        entry = header[name]
        begin, end = entry["data_offsets"]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        with path.open("rb") as file:
            file.seek(data_start + begin + max(0, end - begin - TENSOR_SAMPLE_BYTES) // 2)
            digest.update(file.read(min(TENSOR_SAMPLE_BYTES, end - begin)))
    return digest.hexdigest()[:32]


def folder_fingerprint(model: str) -> str:
    """Returns 12 hexadecimal digits for a model's folder, or for the name of a hub id.

    It covers each file's name, size and three samples.
    """
    folder = Path(model).expanduser()
    digest = hashlib.sha256()
    if not folder.is_dir():
        digest.update(model.encode())
        return digest.hexdigest()[:12]
    for path in sorted(folder.iterdir()):
        if path.suffix not in MODEL_SUFFIXES:
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for start in sorted({0, max(0, size // 2), max(0, size - FILE_SAMPLE_BYTES)}):
                file.seek(start)
                digest.update(file.read(FILE_SAMPLE_BYTES))
    return digest.hexdigest()[:12]


def file_hashes(files: Iterable[Path], folder: Path) -> dict[str, str]:
    """Returns the hash of each file's whole content, by the file's place in `folder`.

    Raises:
        UserError: for a file that cannot be read.
    """
    ordered = sorted(files)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        hashes = list(pool.map(_hash, ordered))
    names = [path.relative_to(folder).as_posix() for path in ordered]
    return dict(zip(names, hashes, strict=True))


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the header of a safetensors file and where its data begin."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            return json.loads(file.read(length)), 8 + length
    except (OSError, ValueError, struct.error) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
