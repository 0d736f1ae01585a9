"""A reference's log-probabilities on disk: written part by part, found by fingerprint.

`reference.cache_path` is a folder of caches, so that data sets, references and settings may share
it and nothing is ever overwritten by another:

    reference_logps/
      3f5c0c9a41b2d687/       one data set under one fingerprint
        cache.json            format, fingerprint, the rows of a pair that are scored, versions
        part-000000.npz       indices [R], ids [R], num_turns [R], and a [U] float64 array a row

A part appears whole, by renaming; one that cannot be read is made anew by `longpo reference`.
Letters as in `data/trees/reference_logps.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.data.jsonl import partial_path, write_whole
from megatron_longpo.data.trees.forest import Row
from megatron_longpo.data.trees.reference_logps import ReferenceLogps, joined
from megatron_longpo.engine.reference_fingerprint import ReferenceFingerprint, differences
from megatron_longpo.engine.run_folder import package_versions
from megatron_longpo.errors import UserError

FORMAT = 1
HEADER_NAME = "cache.json"
REMEDY = "make it with `longpo reference` and these settings"


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheHeader:
    """`cache.json`."""

    fingerprint: ReferenceFingerprint
    rows: tuple[Row, ...]
    """Which of a pair's rows are scored."""

    @property
    def folder_name(self) -> str:
        named = json.dumps([FORMAT, self.fingerprint.short, self.rows])
        return hashlib.blake2b(named.encode(), digest_size=8).hexdigest()


class CacheWriter:
    """Adds parts to one cache; only one process has one."""

    def __init__(self, cache_path: Path, header: CacheHeader, made_with: Mapping[str, Any]) -> None:
        """Goes on with what is there of this very cache.

        Args:
            cache_path: `reference.cache_path`.
            header: what is computed.
            made_with: what else to note of this run, for people.
        """
        self.header = header
        self.folder = cache_path / header.folder_name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.damaged: list[Path] = []
        """Parts that could not be read; their rows are to be made anew."""
        self._saved_parts: list[ReferenceLogps] = []
        for path in part_paths(self.folder):
            try:
                self._saved_parts.append(read_part(path, header.rows))
            except UserError:
                self.damaged.append(path)
                path.unlink()
        contents = {
            "format": FORMAT,
            **asdict(header),
            "made_with": {**made_with, "versions": package_versions()},
        }
        write_whole(self.folder / HEADER_NAME, json.dumps(contents, indent=2) + "\n")

    @property
    def saved(self) -> set[int]:
        """Indices of the rows that are there already."""
        return {int(index) for part in self._saved_parts for index in part.indices}

    def write(self, part: ReferenceLogps) -> Path:
        """Saves some rows; they are on the disk when this returns."""
        assert tuple(part.sums) == self.header.rows
        numbers = [int(path.stem.removeprefix("part-")) for path in part_paths(self.folder)]
        path = self.folder / f"part-{max(numbers, default=-1) + 1:06d}.npz"
        partial = partial_path(path)
        with open(partial, "wb") as file:
            np.savez(
                file,
                indices=part.indices,
                ids=part.ids,
                num_turns=part.num_turns,
                **part.sums,  # type: ignore[arg-type]
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        return path


def part_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.npz"))


def read_part(path: Path, rows: Sequence[Row]) -> ReferenceLogps:
    """Reads one part; a `UserError` where it is damaged."""
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
    cache_path: Path, fingerprint: ReferenceFingerprint, rows: Sequence[Row], *, data_key: str
) -> ReferenceLogps:
    """The cached sums of a data set.

    Args:
        cache_path: `reference.cache_path`.
        fingerprint: of the reference and of the data set's rows.
        rows: the rows of a pair that are needed; a cache of more serves too.
        data_key: `data.path` or `data.eval_path`, for messages.

    Raises:
        UserError: if there is none, naming what the nearest one differs in.
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


def _read(folder: Path, rows: Sequence[Row]) -> ReferenceLogps:
    empty = ReferenceLogps(
        indices=np.empty(0, dtype=np.int64),
        ids=np.empty(0, dtype=np.str_),
        num_turns=np.empty(0, dtype=np.int64),
        sums={row: np.empty(0) for row in rows},
    )
    parts = [read_part(path, rows) for path in part_paths(folder)]
    return joined([empty, *parts], source=str(folder))


def _headers(cache_path: Path) -> dict[Path, CacheHeader]:
    """The caches of a folder. One whose header a crash has torn is none until it is made again."""
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
