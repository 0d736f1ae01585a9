"""Rows of Parquet files, opened by their exact paths and read by position."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.data.rows.arrow_values import plain_value
from megatron_longpo.errors import UserError

CACHE_BYTES = 256 << 20
"""Decoded rows that are kept; the largest batch may exceed it."""
WHOLE_GROUP_BYTES = 64 << 20
"""Row groups up to this decoded size are read at once."""
BATCH_BYTES = 32 << 20
"""Decoded size of the batches in which larger row groups are read."""
_VALUE_BYTES = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 8, "FLOAT": 4, "DOUBLE": 8}
_HIDDEN = (".", "_", "#")
_BACKUPS = frozenset(("bak", "backup", "old", "orig", "part", "partial", "swp", "temp", "tmp"))
_LFS_POINTER = b"version https://git-lfs"


def parquet_files(folder: Path) -> list[Path]:
    """Returns the .parquet files below `folder` in order, without hidden ones and backups.

    Raises `UserError` if all are left out. Links are followed, and each folder is read once.
    """
    found: list[Path] = []
    left_out: list[Path] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in seen:  # a link may lead back to a folder above it
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        for name in names:
            if name.lower().endswith(".parquet"):
                path = Path(parent, name)
                left = any(map(_is_left_out, path.relative_to(folder).parts))
                (left_out if left else found).append(path)
    if left_out and not found:
        shown = ", ".join(str(path.relative_to(folder)) for path in sorted(left_out)[:3])
        raise UserError(
            f"{folder}: all of its .parquet files are hidden or backups ({shown}); rename them, or "
            "give one by its own path"
        )
    return sorted(found)


def _is_left_out(name: str) -> bool:
    """Tells names of hidden files and folders, and of backups and unfinished files."""
    words = name.lower().removesuffix(".parquet").split(".")
    return name.startswith(_HIDDEN) or words[-1].endswith("~") or not _BACKUPS.isdisjoint(words[1:])


class ParquetSource:
    """The rows of Parquet files, in the files' order; lists of integers come as arrays.

    Batches of rows are decoded on access, and the last ones are kept. Rows in order are decoded
    once. A row elsewhere costs its row group up to that row.
    """

    def __init__(self, files: Sequence[Path], *, name: str, keep: Collection[str] | None) -> None:
        """Reads only the columns in `keep`, as far as a file has them; None reads all."""
        self._files = list(files)
        self._name = name
        self._metadata: list[Any] = []
        self._columns: list[tuple[str, ...]] = []
        """The columns that are read, by file."""
        self._groups: list[tuple[int, int]] = []
        """File and number in that file, by row group."""
        rows: list[int] = []
        for number, file in enumerate(self._files):
            with _faults_named(file), _opened(file) as parquet:
                metadata, names = parquet.metadata, parquet.schema_arrow.names
            self._metadata.append(metadata)
            self._columns.append(tuple(n for n in names if keep is None or n in keep))
            self._groups += ((number, group) for group in range(metadata.num_row_groups))
            rows += (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        self._ends = np.cumsum(rows, dtype=np.int64)
        self._filled = [i for i, m in enumerate(self._metadata) if m.num_rows] or range(len(files))
        """Files with rows, or all if none has any."""
        shared = set.intersection(*(set(self._columns[i]) for i in self._filled))
        self.column_names: tuple[str, ...] | None = tuple(
            n for n in self._columns[self._filled[0]] if n in shared
        )
        self.fingerprint = _hash_of(self._files)
        self._batches = _Batches()

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends.size else 0

    def __getstate__(self) -> dict[str, Any]:
        # An open file and decoded rows stay in their process.
        return {**self.__dict__, "_batches": _Batches()}

    def columns(self, index: int) -> Mapping[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        group = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[group - 1]) if group else 0)
        number, group_of_file = self._groups[group]
        file, names = self._files[number], self._columns[number]
        with _faults_named(file):
            table, at = self._batches.find(
                file, self._metadata[number], group=group_of_file, row=row, names=names
            )
            return {
                name: plain_value(column[at])
                for name, column in zip(table.column_names, table.columns, strict=True)
            }

    def where(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def file_without(self, column: str) -> Path:
        """Returns the first file that has rows and lacks a column."""
        return next(self._files[i] for i in self._filled if column not in self._columns[i])


class _Batches:
    """Decoded batches of rows: the last ones, and an open row group to decode the next from."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Path, int, int], Any] = OrderedDict()
        """Tables by file, row group and number of the batch, the last used at the end."""
        self._bytes = 0
        """Size of the kept tables."""
        self._open: tuple[Path, int] | None = None
        """File and row group that `_coming` decodes."""
        self._coming: Iterator[Any] = iter(())
        self._next = 0
        """Number of the batch that `_coming` yields next."""

    def find(
        self, file: Path, metadata: Any, *, group: int, row: int, names: tuple[str, ...]
    ) -> tuple[Any, int]:
        """Returns a table with a row of a row group, and the row's index in the table."""
        size = _batch_rows(metadata.row_group(group), names)
        number, at = divmod(row, size)
        key = (file, group, number)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key], at
        if self._open != (file, group) or self._next > number:
            self._coming = _decoded(file, metadata, group=group, names=names, size=size)
            self._open, self._next = (file, group), 0
        try:
            while self._next <= number:
                table = next(self._coming, None)
                if table is None:
                    raise OSError(f"row group {group} ends before row {row}")
                self._keep((file, group, self._next), table)
                self._next += 1
        except BaseException:
            self._open = None
            raise
        return self._kept[key], at

    def _keep(self, key: tuple[Path, int, int], table: Any) -> None:
        replaced = self._kept.pop(key, None)
        self._bytes += table.nbytes - (replaced.nbytes if replaced is not None else 0)
        self._kept[key] = table
        while len(self._kept) > 1 and self._bytes > CACHE_BYTES:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes


def _batch_rows(group: Any, names: Collection[str]) -> int:
    """Returns how many rows of a row group are decoded at once."""
    size = 0
    for number in range(group.num_columns):
        column = group.column(number)
        if column.path_in_schema.split(".")[0] in names:
            decoded = column.num_values * _VALUE_BYTES.get(column.physical_type, 4)
            size += max(decoded, column.total_uncompressed_size)
    if size <= WHOLE_GROUP_BYTES:
        return max(1, group.num_rows)
    return max(1, BATCH_BYTES * group.num_rows // size)


def _decoded(
    file: Path, metadata: Any, *, group: int, names: tuple[str, ...], size: int
) -> Iterator[Any]:
    """Yields tables of `size` rows of a row group; the last one may have fewer."""
    import pyarrow as pa

    with _opened(file) as parquet:
        if not parquet.metadata.equals(metadata):
            raise UserError(f"{file}: was replaced while it was read; start again")
        pieces: list[Any] = []
        # Text of more than 2 GiB comes in smaller batches than were asked for.
        for piece in parquet.iter_batches(size, row_groups=[group], columns=list(names)):
            pieces.append(piece)
            if sum(map(len, pieces)) >= size:
                table = pa.Table.from_batches(pieces)
                yield table.slice(0, size)
                rest = table.slice(size)
                pieces = rest.to_batches()
        if pieces:
            yield pa.Table.from_batches(pieces)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    # A path given to pyarrow might be read as an address (file:...), an opened file is not.
    with pa.OSFile(os.fspath(file)) as opened:
        # Without these, the whole row group would be in memory before its first batch.
        yield ParquetFile(opened, buffer_size=1 << 20, pre_buffer=False)


@contextmanager
def _faults_named(file: Path) -> Iterator[None]:
    """Turns what pyarrow raises for a damaged file into a `UserError` with the cause."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        cause = " ".join(str(error).split())
        if _starts_with(file, _LFS_POINTER):
            cause = "it is a Git LFS pointer, not the data; run git lfs pull in the clone"
        raise UserError(f"{file}: not readable as Parquet ({cause})") from error


def _starts_with(file: Path, beginning: bytes) -> bool:
    try:
        with open(file, "rb") as stream:
            return stream.read(len(beginning)) == beginning
    except OSError:
        return False


def _hash_of(files: Sequence[Path]) -> str:
    """Returns a hash of the files' bytes, which does not depend on their names and times."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with _faults_named(file), open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
