"""Where rows come from: a JSONL file, an Arrow or Parquet folder, or a dataset of the hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_longpo.data.jsonl import JsonlFile
from megatron_longpo.errors import UserError

LONG_BRANCHES = ("chosen", "rejected")
REFERENCE_BRANCHES = ("ref_chosen", "ref_rejected")
PARTS = ("input_ids", "attention_mask", "labels")
COLUMNS = tuple(f"{b}_{part}" for b in LONG_BRANCHES + REFERENCE_BRANCHES for part in PARTS)
"""The columns of the public LongPO schema, all required."""


class RowSource(Protocol):
    """Unchecked rows by index."""

    fingerprint: str
    """A hash of the content: the same data give the same value wherever they lie."""

    def __len__(self) -> int: ...

    def columns(self, index: int) -> Mapping[str, Any]:
        """The columns of a row, as lists or arrays, with `id` where there is one."""

    def where(self, index: int) -> str:
        """`rows.jsonl:17` or `folder[16]`, for messages."""


class JsonlSource:
    """One object a line."""

    def __init__(self, path: Path) -> None:
        self._file = JsonlFile(path)
        self.fingerprint = self._file.fingerprint

    def __len__(self) -> int:
        return len(self._file)

    def columns(self, index: int) -> Mapping[str, Any]:
        return self._file[index]

    def where(self, index: int) -> str:
        return self._file.where(index)


class ArrowSource:
    """A `datasets.Dataset`, memory-mapped; a row's columns come as NumPy arrays without a copy."""

    def __init__(self, dataset: Any, *, name: str, fingerprint: str) -> None:
        missing = [column for column in COLUMNS if column not in dataset.column_names]
        if missing:
            raise UserError(
                f"{name}: lacks the column {missing[0]}; the LongPO schema needs "
                f"{', '.join(COLUMNS)}"
            )
        wanted = [*COLUMNS, *(["id"] if "id" in dataset.column_names else [])]
        self._dataset = dataset.select_columns(wanted).with_format("arrow")
        self._name = name
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._dataset)

    def columns(self, index: int) -> Mapping[str, Any]:
        table = self._dataset[index]
        return {name: _plain(table.column(name)[0]) for name in table.column_names}

    def where(self, index: int) -> str:
        return f"{self._name}[{index}]"


def _plain(scalar: Any) -> Any:
    """An Arrow scalar as a NumPy array, a list of arrays (list of lists) or a plain value."""
    import pyarrow as pa

    if not isinstance(scalar, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
        return scalar.as_py()
    values = scalar.values
    if values is None:
        return None
    if pa.types.is_integer(values.type) or pa.types.is_boolean(values.type):
        # A null inside would turn the array into floats; the list keeps it visible to the check.
        return values.to_pylist() if values.null_count else values.to_numpy(zero_copy_only=False)
    if pa.types.is_nested(values.type):
        return [_plain(value) for value in values]
    return values.to_pylist()


def open_source(path: str) -> RowSource:
    """Opens a path or hub id; `UserError` where nothing there holds rows."""
    local = Path(path).expanduser()
    if local.is_dir():
        return _open_folder(local)
    if local.exists():
        return _open_parquet([local], local) if local.suffix == ".parquet" else JsonlSource(local)
    if local.suffix not in (".jsonl", ".json", ".parquet") and re.fullmatch(
        r"[\w-][\w.-]*/[\w-][\w.-]*", path
    ):
        return _open_hub(path)
    raise UserError(f"{path}: no such file or folder, and not a hub id (owner/name)")


def _open_folder(folder: Path) -> RowSource:
    saved = (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
    if saved:
        import datasets

        try:
            loaded = datasets.load_from_disk(str(folder))
        except Exception as error:  # datasets and pyarrow raise many kinds for a damaged folder
            raise UserError(f"{folder}: not readable as a dataset folder ({error})") from error
        dataset = _one_split(loaded, str(folder))
        return ArrowSource(dataset, name=str(folder), fingerprint=_arrow_fingerprint(dataset))
    parquet = sorted(folder.rglob("*.parquet"))
    if parquet:
        return _open_parquet(parquet, folder)
    raise UserError(
        f"{folder}: neither a save_to_disk folder nor a folder with .parquet files; "
        "give a JSONL file by its own path"
    )


def _open_parquet(files: list[Path], name: Path) -> RowSource:
    import datasets

    # The fingerprint of `datasets` for files follows their times; ours follows their bytes.
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    try:
        dataset = datasets.load_dataset(
            "parquet", data_files=[str(file) for file in files], split="train"
        )
    except Exception as error:
        raise UserError(f"{name}: not readable as Parquet ({error})") from error
    return ArrowSource(dataset, name=str(name), fingerprint=digest.hexdigest())


def _open_hub(hub_id: str) -> RowSource:
    import datasets

    try:
        loaded = datasets.load_dataset(hub_id)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{hub_id}: no such file or folder here, and the hub did not give it ({reason})"
        ) from error
    dataset = _one_split(loaded, hub_id)
    return ArrowSource(dataset, name=hub_id, fingerprint=_arrow_fingerprint(dataset))


def _one_split(loaded: Any, name: str) -> Any:
    """The only split, or the one called `train`."""
    import datasets

    if isinstance(loaded, datasets.Dataset):
        return loaded
    splits = list(loaded)
    if len(splits) != 1 and "train" not in splits:
        raise UserError(
            f"{name}: has the splits {', '.join(splits)} and none is called train; "
            "give the folder of one split"
        )
    return loaded[splits[0] if len(splits) == 1 else "train"]


def _arrow_fingerprint(dataset: Any) -> str:
    return f"{dataset._fingerprint}-{len(dataset)}"
