"""Finds the sources of documents under a path, a pattern or a hub id."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

from megatron_longpo.data.rows.sources import HUB_ID, one_split
from megatron_longpo.errors import UserError
from megatron_longpo.generation.documents.formats import (
    HubDataset,
    JsonlFile,
    ParquetTable,
    Read,
    ReadOptions,
    Source,
    TextFile,
)


def open_sources(path: str, options: ReadOptions) -> tuple[list[Source], list[Read]]:
    """Returns the sources under a path, a pattern or a hub id, ordered by name, and faults.

    Faults are what a folder holds that cannot be opened: broken links, folders without permission.
    Links are followed, each folder is read once; hidden files are left out.
    """
    root = Path(path).expanduser()
    if root.exists():
        roots = [root]
    elif glob.has_magic(path):
        roots = [Path(found) for found in sorted(glob.glob(str(root), recursive=True))]
        if not roots:
            raise UserError(f"{options.key} ({path}): no file or folder matches this pattern")
        # `**` finds folders and what is in them.
        roots = [found for found in roots if not found.is_dir()] if "**" in path else roots
    elif HUB_ID.fullmatch(path):
        return [HubDataset(_from_hub(path, options), path, options)], []
    else:
        raise UserError(
            f"{options.key} ({path}): no such file or folder, and not a hub id (owner/name)"
        )
    sources: list[Source] = []
    faults: list[Read] = []
    for one in roots:
        if (one / "state.json").exists() or (one / "dataset_dict.json").exists():
            sources.append(HubDataset(_from_disk(one, options), str(one), options))
        elif one.is_dir():
            files, broken = _files_of(one)
            sources += [_open_file(file, options) for file in files]
            faults += broken
        else:
            sources.append(_open_file(one, options))
    if options.split is not None and not any(isinstance(one, HubDataset) for one in sources):
        raise UserError(f"split ({options.split}): {path} has no splits; leave split out")
    if options.subset is not None:
        raise UserError(f"subset ({options.subset}): {path} is no hub id; leave subset out")
    return sources, faults


def _open_file(path: Path, options: ReadOptions) -> Source:
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")):
        return JsonlFile(path, options)
    if name.endswith(".parquet"):
        return ParquetTable(path, options)
    return TextFile(path, options)


def _files_of(folder: Path) -> tuple[list[Path], list[Read]]:
    files: list[Path] = []
    faults: list[Read] = []
    seen: set[tuple[int, int]] = set()

    def fault(path: str | Path, reason: str) -> None:
        faults.append(Read(source=str(path), name="", text=None, fault=reason))

    def unreadable(error: OSError) -> None:
        fault(error.filename, "unreadable folder")

    # A link may lead back to a folder above it.
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(parent, name)
            if name.startswith("."):
                continue
            if path.exists():
                files.append(path)
            else:
                fault(path, "broken link")
    return sorted(files), faults


def _from_disk(folder: Path, options: ReadOptions) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets and pyarrow raise many kinds for a damaged folder
        raise UserError(f"{folder}: not readable as a dataset folder ({error})") from error
    return one_split(loaded, str(folder), options.split)


def _from_hub(hub_id: str, options: ReadOptions) -> Any:
    import datasets

    try:
        loaded = datasets.load_dataset(hub_id, options.subset, streaming=True)
    except Exception as error:
        reason = " ".join(str(error).split())
        # It has several, and the reason names them.
        if reason.startswith(("Config name is missing", "BuilderConfig")):
            subset = options.subset or "null"
            raise UserError(f"subset ({subset}): {hub_id}: {reason[:300]}") from error
        raise UserError(
            f"{options.key} ({hub_id}): no such file or folder here, and the hub did not give it "
            f"({reason[:300]})"
        ) from error
    return one_split(loaded, hub_id, options.split)
