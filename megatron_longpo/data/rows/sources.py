"""Sources of rows of tokens or texts: JSON files, Arrow and Parquet folders, and the hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_longpo.data.jsonl import JsonlFile
from megatron_longpo.data.rows.arrow_values import plain_value
from megatron_longpo.data.rows.parquet import ParquetSource, parquet_files
from megatron_longpo.data.rows.splits import (
    TRAIN_SPLITS,
    choose_split,
    files_by_split,
    refuse_split,
)
from megatron_longpo.errors import UserError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""`owner/name` of a data set."""


class RowSource(Protocol):
    """Unchecked rows by index."""

    fingerprint: str
    """A hash of the content, independent of where the data are stored."""
    column_names: tuple[str, ...] | None
    """The columns that every row has; None if rows may differ."""

    def __len__(self) -> int: ...

    def columns(self, index: int) -> Mapping[str, Any]:
        """Returns the columns of a row: plain values, lists of integers as lists or arrays."""

    def where(self, index: int) -> str:
        """Returns `rows.jsonl:17` or `folder[16]`, for messages."""


class JsonlSource:
    """A JSONL file: one object a line."""

    column_names: tuple[str, ...] | None = None

    def __init__(self, path: Path) -> None:
        self._file = JsonlFile(path)
        self.fingerprint = self._file.fingerprint

    def __len__(self) -> int:
        return len(self._file)

    def columns(self, index: int) -> Mapping[str, Any]:
        return self._file[index]

    def where(self, index: int) -> str:
        return self._file.where(index)


class JsonArraySource:
    """A JSON file that holds one list of objects, all of it in memory."""

    column_names: tuple[str, ...] | None = None

    def __init__(self, path: Path) -> None:
        self._path = path
        content = path.read_bytes()
        self.fingerprint = hashlib.blake2b(content, digest_size=16).hexdigest()
        try:
            self._values = json.loads(content)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason})") from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(
                f"{path}: not a JSON list of objects ({error}); mend it, or write one object a line"
            ) from error

    def __len__(self) -> int:
        return len(self._values)

    def columns(self, index: int) -> Mapping[str, Any]:
        value = self._values[index]
        if not isinstance(value, dict):
            raise UserError(
                f"{self.where(index)}: is a JSON {type(value).__name__}, must be an object"
            )
        return value

    def where(self, index: int) -> str:
        return f"{self._path}[{index}]"


class ArrowSource:
    """A `datasets.Dataset`, memory-mapped; lists of integers come as arrays without a copy."""

    def __init__(
        self, dataset: Any, *, name: str, fingerprint: str, keep: Collection[str] | None
    ) -> None:
        """Reads only the columns in `keep`, as far as they exist; None reads all."""
        if keep is not None:
            dataset = dataset.select_columns([n for n in dataset.column_names if n in keep])
        self._dataset = dataset.with_format("arrow")
        self.column_names: tuple[str, ...] | None = tuple(dataset.column_names)
        self._name = name
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._dataset)

    def columns(self, index: int) -> Mapping[str, Any]:
        table = self._dataset[index]
        return {name: plain_value(table.column(name)[0]) for name in table.column_names}

    def where(self, index: int) -> str:
        return f"{self._name}[{index}]"


def open_source(
    path: str,
    *,
    keep: Collection[str] | None = None,
    split: str | None = None,
    default_splits: Sequence[str] = TRAIN_SPLITS,
) -> RowSource:
    """Opens a path or hub id; raises `UserError` if nothing there holds rows.

    Args:
        path: a JSONL file, a JSON file with a list, a `save_to_disk` folder, a Parquet file or
            folder, or a hub id.
        keep: the columns that are needed; others may be left unread.
        split: name of the split, if a hub id or folder has several; None = the only one, or the
            first of `default_splits` that exists.
        default_splits: what to read from several splits if none is named.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return _open_folder(local, keep, split, default_splits)
    if local.exists():
        refuse_split(split, path)
        if local.suffix.lower() == ".parquet":
            return ParquetSource([local], name=str(local), keep=keep)
        return JsonArraySource(local) if _holds_list(local) else JsonlSource(local)
    if local.suffix not in (".jsonl", ".json", ".parquet") and HUB_ID.fullmatch(path):
        return _open_hub(path, keep, split, default_splits)
    raise UserError(f"{path}: no such file or folder, and not a hub id (owner/name)")


def _holds_list(path: Path) -> bool:
    """Tells a .json file that is one list from JSONL, whose lines are objects."""
    if path.suffix != ".json":
        return False
    try:
        with open(path, "rb") as file:
            return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    except OSError:
        return False  # `JsonlFile` says why


def _open_folder(
    folder: Path, keep: Collection[str] | None, split: str | None, default_splits: Sequence[str]
) -> RowSource:
    saved = (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
    if saved:
        import datasets

        try:
            loaded = datasets.load_from_disk(str(folder))
        except Exception as error:  # datasets and pyarrow raise many kinds for a damaged folder
            raise UserError(f"{folder}: not readable as a dataset folder ({error})") from error
        return _arrow_source(loaded, str(folder), keep, split, default_splits)
    files = parquet_files(folder)
    if files:
        splits = files_by_split(files, folder)
        chosen = choose_split(splits, str(folder), split, default_splits)
        return ParquetSource(splits[chosen], name=str(folder), keep=keep)
    raise UserError(
        f"{folder}: neither a save_to_disk folder nor a folder with .parquet files; "
        "give a JSONL file by its own path"
    )


def _open_hub(
    hub_id: str, keep: Collection[str] | None, split: str | None, default_splits: Sequence[str]
) -> RowSource:
    import datasets

    try:
        loaded = datasets.load_dataset(hub_id)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{hub_id}: no such file or folder here, and the hub did not give it ({reason})"
        ) from error
    return _arrow_source(loaded, hub_id, keep, split, default_splits)


def _arrow_source(
    loaded: Any,
    name: str,
    keep: Collection[str] | None,
    split: str | None,
    default_splits: Sequence[str],
) -> RowSource:
    dataset = one_split(loaded, name, split, default_splits)
    # Taken before columns are left out, since `datasets` gives the rest another fingerprint.
    fingerprint = f"{dataset._fingerprint}-{len(dataset)}"
    return ArrowSource(dataset, name=name, fingerprint=fingerprint, keep=keep)


def one_split(
    loaded: Any, name: str, split: str | None, default_splits: Sequence[str] = TRAIN_SPLITS
) -> Any:
    """Returns the split called `split`, or if that is None the only one or a default."""
    import datasets

    if isinstance(loaded, datasets.Dataset):
        refuse_split(split, name)
        return loaded
    return loaded[choose_split(list(loaded), name, split, default_splits)]
