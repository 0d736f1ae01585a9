"""A fingerprint of a Hugging Face folder's weights that takes a moment, not a reading of them all.

It covers every tensor's name, dtype, shape and the bytes in its middle, and not how the tensors
are spread over files: training changes every matrix everywhere.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from checkpoints_convert.hf_weights import HfWeights
from megatron_longpo.errors import UserError

SAMPLE_BYTES = 4096
"""Read from the middle of each tensor."""


def weights_fingerprint(hf_folder: str) -> str:
    """32 hexadecimal digits, the same wherever the folder lies and however it is sharded."""
    weights = HfWeights(hf_folder)
    headers: dict[Path, tuple[dict[str, Any], int]] = {}
    digest = hashlib.sha256()
    for name in sorted(weights.names):
        path = weights.path_of(name)
        if path not in headers:
            headers[path] = _header(path)
        header, data_start = headers[path]
        entry = header[name]
        begin, end = entry["data_offsets"]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        with path.open("rb") as file:
            file.seek(data_start + begin + max(0, end - begin - SAMPLE_BYTES) // 2)
            digest.update(file.read(min(SAMPLE_BYTES, end - begin)))
    return digest.hexdigest()[:32]


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begin."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            return json.loads(file.read(length)), 8 + length
    except (OSError, ValueError, struct.error) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
