"""Small caches of log-probabilities, for the tests of their writer and their reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.config.names import RowName
from megatron_longpo.data.trees.reference_logps import ReferenceLogps
from megatron_longpo.engine.reference_cache import CacheHeader, find_logps
from megatron_longpo.engine.reference_fingerprint import ReferenceFingerprint
from megatron_longpo.reference.writer import CacheWriter

SHORT: tuple[RowName, ...] = ("short_chosen", "short_rejected")
LONG: tuple[RowName, ...] = ("long_chosen", "long_rejected")
FINGERPRINT = ReferenceFingerprint(
    weights={"model.safetensors": "a" * 32},
    config={"rope.theta": 10000.0, "rope.scaling": None},
    tokenizer={"tokenizer.json": "b" * 32},
    rows={"fingerprint": "c" * 32, "number": 3},
    settings={"data.max_length": 100},
)


def part(*indices: int, rows: tuple[RowName, ...] = SHORT) -> ReferenceLogps:
    """One turn a row, and the row's index as its sum."""
    values = np.array(indices, dtype=np.float64)
    return ReferenceLogps(
        indices=np.array(indices, dtype=np.int64),
        ids=np.array([f"id {index} ü" for index in indices]),
        num_turns=np.ones(len(indices), dtype=np.int64),
        sums=dict.fromkeys(rows, -values / 3),
    )


def writer(
    folder: Path, fingerprint: ReferenceFingerprint = FINGERPRINT, rows: tuple[RowName, ...] = SHORT
) -> CacheWriter:
    return CacheWriter(folder, CacheHeader(fingerprint=fingerprint, rows=rows), {"by": "test"})


def find(folder: Path, fingerprint: ReferenceFingerprint = FINGERPRINT, **how: Any) -> Any:
    return find_logps(folder, fingerprint, how.get("rows", SHORT), data_key="data.path")
