"""The format of a reference's log-probabilities on disk, and their reader.

`reference.cache_path` is a folder of caches, one for each data set, reference and config, so that
runs may share it and never overwrite each other's files:

    reference_logps/
      3f5c0c9a41b2d687/       one data set under one fingerprint
        cache.json            format, fingerprint, the rows of a pair that are scored, versions
        part-000000.npz       indices [R], ids [R], num_turns [R], and a [U] float64 array a row

`longpo reference` writes them (`reference/writer.py`). A part appears whole, by renaming, and one
that cannot be read is computed again. Letters as in `data/trees/reference_logps.py`.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.config.names import RowName
from megatron_longpo.data.trees.reference_logps import ReferenceLogps, joined
from megatron_longpo.engine.reference_fingerprint import ReferenceFingerprint, differences
from megatron_longpo.errors import UserError

FORMAT = 1
HEADER_NAME = "cache.json"
REMEDY = "make it with `longpo reference` and these settings"


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheHeader:
    """`cache.json`."""

    fingerprint: ReferenceFingerprint
    rows: tuple[RowName, ...]
    """The rows of a pair that are scored."""

    @property
    def folder_name(self) -> str:
        """16 hexadecimal digits, different for caches that must not share a folder."""
        named = json.dumps([FORMAT, self.fingerprint.short, self.rows])
        return hashlib.blake2b(named.encode(), digest_size=8).hexdigest()

    def contents(self) -> dict[str, Any]:
        """Returns the keys of `cache.json` that the reader needs."""
        return {"format": FORMAT, **asdict(self)}


def part_paths(folder: Path) -> list[Path]:
    """Returns the parts of a cache in the order they were written."""
    return sorted(folder.glob("part-*.npz"))


def read_part(path: Path, rows: Sequence[RowName]) -> ReferenceLogps:
    """Reads one part.

    Raises:
        UserError: if it is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            part = ReferenceLogps(
                indices=arrays["indices"],
                ids=arrays["ids"],
                num_turns=arrays["num_turns"],
                sums={row: arrays[row] for row in rows},
                source=str(path),
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: damaged ({error}); run `longpo reference` with these settings again, which "
            "makes its rows anew"
        ) from error
    lengths = {len(part.indices), len(part.ids), len(part.num_turns)}
    total = int(part.num_turns.sum())
    if len(lengths) != 1 or any(
        len(sums) != total or not np.isfinite(sums).all() for sums in part.sums.values()
    ):
        raise UserError(
            f"{path}: damaged (its arrays do not fit together, or hold no numbers); run `longpo "
            "reference` with these settings again, which makes its rows anew"
        )
    return part


def find_logps(
    cache_path: Path, fingerprint: ReferenceFingerprint, rows: Sequence[RowName], *, data_key: str
) -> ReferenceLogps:
    """Returns the cached sums of a data set.

    Args:
        cache_path: `reference.cache_path`.
        fingerprint: of the reference and of the data set's rows.
        rows: the rows of a pair that are needed; a cache with more rows serves too.
        data_key: `data.path` or `data.eval_path`, for messages.

    Raises:
        UserError: if there is none; it names what differs in the most similar cache.
    """
    where = f"reference.cache_path ({cache_path})"
    found = _headers(cache_path)
    if not found:
        raise UserError(f"{where}: holds no reference log-probabilities yet; {REMEDY}")
    unlike = {folder: differences(h.fingerprint, fingerprint) for folder, h in found.items()}
    fitting = [folder for folder, parts in unlike.items() if not parts]
    if not fitting:
        nearest = min(unlike.values(), key=lambda parts: (len(parts), "weights" in parts))
        named = ", ".join(
            f"{part} ({data_key if part == 'rows' else text})" for part, text in nearest.items()
        )
        raise UserError(
            f"{where}: what is there was computed with other {named}; make it anew with `longpo "
            "reference` and these settings"
        )
    enough = [folder for folder in fitting if set(rows) <= set(found[folder].rows)]
    if not enough:
        most = max((found[folder].rows for folder in fitting), key=lambda r: len({*r} & {*rows}))
        raise UserError(
            f"{where}: has no sums of {', '.join(row for row in rows if row not in most)}, which "
            f"this objective needs; {REMEDY}"
        )
    caches = [_read(folder, found[folder].rows) for folder in enough]
    return max(caches, key=len)


def _read(folder: Path, rows: Sequence[RowName]) -> ReferenceLogps:
    empty = ReferenceLogps(
        indices=np.empty(0, dtype=np.int64),
        ids=np.empty(0, dtype=np.str_),
        num_turns=np.empty(0, dtype=np.int64),
        sums={row: np.empty(0) for row in rows},
    )
    parts = [read_part(path, rows) for path in part_paths(folder)]
    return joined([empty, *parts], source=str(folder))


def _headers(cache_path: Path) -> dict[Path, CacheHeader]:
    """Returns the caches of a folder by path; one whose header cannot be read is left out."""
    found = {}
    for path in sorted(cache_path.glob(f"*/{HEADER_NAME}")):
        try:
            contents = json.loads(path.read_text(encoding="utf-8"))
            header = CacheHeader(
                fingerprint=ReferenceFingerprint(**contents["fingerprint"]),
                rows=tuple(contents["rows"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if contents.get("format") == FORMAT:
            found[path.parent] = header
    return found
