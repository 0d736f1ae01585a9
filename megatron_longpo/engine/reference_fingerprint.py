"""A fingerprint of everything that a reference's log-probabilities depend on, part by part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from checkpoints_convert.hf_folder import TOKENIZER_FILES
from checkpoints_convert.hf_weights import HfWeights
from megatron_longpo.config.train import TrainConfig
from megatron_longpo.data.model_fingerprints import file_hashes
from megatron_longpo.data.rows.dataset import RowDataset
from megatron_longpo.model.architectures import Architecture


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceFingerprint:
    """Equal fingerprints mean equal log-probabilities, up to the rounding of a kernel.

    Every part is a flat mapping of plain values, so that a difference can be shown.
    """

    weights: Mapping[str, Any]
    """Content hash of each safetensors file."""
    config: Mapping[str, Any]
    """The architecture with its RoPE, as read: config.json has several ways to write it."""
    tokenizer: Mapping[str, Any]
    """Content hash of each tokenizer file and of the chat template: rows are made with them."""
    rows: Mapping[str, Any]
    """Fingerprint and number of the data set's rows."""
    settings: Mapping[str, Any]
    """Settings that change which tokens of a row are read, or how they are computed."""

    @property
    def short(self) -> str:
        """The fingerprint in 16 hexadecimal digits."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


PARTS = tuple(ReferenceFingerprint.__dataclass_fields__)
HASHED = ("weights", "tokenizer", "rows")
"""Parts whose values are hashes, which messages leave out."""


def fingerprint_model(config: TrainConfig, folder: str, arch: Architecture) -> ReferenceFingerprint:
    """Returns the fingerprint of a reference in `folder`, without rows, which `with_rows` adds.

    It reads all weights once. `config` is resolved.
    """
    weights = HfWeights(folder)
    weight_files = {weights.path_of(name) for name in weights.names}
    return ReferenceFingerprint(
        weights=file_hashes(weight_files, Path(folder)),
        config=_flat(asdict(arch)),
        tokenizer=file_hashes(_tokenizer_files(Path(folder)), Path(folder)),
        rows={},
        settings={
            "model.dtype": config.model.dtype,
            "data.max_length": config.data.max_length,
            "data.too_long": config.data.too_long,
        },
    )


def with_rows(fingerprint: ReferenceFingerprint, dataset: RowDataset) -> ReferenceFingerprint:
    """Returns the fingerprint with the rows of a data set."""
    rows = {"fingerprint": dataset.fingerprint, "number": len(dataset)}
    return replace(fingerprint, rows=rows)


def differences(saved: ReferenceFingerprint, ours: ReferenceFingerprint) -> dict[str, str]:
    """Returns what differs, by part; it is empty for equal fingerprints.

    For example `weights` -> `model.safetensors`, `config` -> `rope.theta 1, now 2`.
    """
    return {
        part: _difference(getattr(saved, part), getattr(ours, part), hashed=part in HASHED)
        for part in PARTS
        if getattr(saved, part) != getattr(ours, part)
    }


def _difference(saved: Mapping[str, Any], ours: Mapping[str, Any], *, hashed: bool) -> str:
    values = {key: (saved.get(key), ours.get(key)) for key in sorted({*saved, *ours})}
    return "; ".join(
        key if hashed else f"{key} {was}, now {now}"
        for key, (was, now) in values.items()
        if was != now
    )


def _tokenizer_files(folder: Path) -> set[Path]:
    found = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)}
    inside = {path for parent in found if parent.is_dir() for path in parent.rglob("*")}
    return {path for path in found | inside if path.is_file()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
