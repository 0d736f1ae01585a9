"""Writes the log-probabilities of a reference in parts, in the format of `reference_cache.py`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.data.jsonl import partial_path, write_whole
from megatron_longpo.data.trees.reference_logps import ReferenceLogps
from megatron_longpo.engine.reference_cache import (
    HEADER_NAME,
    CacheHeader,
    part_paths,
    read_part,
)
from megatron_longpo.engine.run_folder import package_versions
from megatron_longpo.errors import UserError


class CacheWriter:
    """Adds parts to one cache; only one process has one."""

    def __init__(self, cache_path: Path, header: CacheHeader, made_with: Mapping[str, Any]) -> None:
        """Opens the cache of `header`, keeping the parts that an earlier run wrote.

        Args:
            cache_path: `reference.cache_path`.
            header: what is computed.
            made_with: further facts of this run, for people.
        """
        self.header = header
        self.folder = cache_path / header.folder_name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.damaged: list[Path] = []
        """Parts that could not be read, and were deleted; their rows are computed again."""
        self._saved_parts: list[ReferenceLogps] = []
        for path in part_paths(self.folder):
            try:
                self._saved_parts.append(read_part(path, header.rows))
            except UserError:
                self.damaged.append(path)
                path.unlink()
        contents = {
            **header.contents(),
            "made_with": {**made_with, "versions": package_versions()},
        }
        write_whole(self.folder / HEADER_NAME, json.dumps(contents, indent=2) + "\n")

    @property
    def saved(self) -> set[int]:
        """Indices of the rows that earlier runs wrote."""
        return {int(index) for part in self._saved_parts for index in part.indices}

    def write(self, part: ReferenceLogps) -> Path:
        """Saves some rows and returns the file; they are on the disk when this returns."""
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
