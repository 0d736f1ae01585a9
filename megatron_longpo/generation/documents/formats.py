"""What documents are read from: text files, lines, tables, and data sets."""

from __future__ import annotations

import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_longpo.data.progress import Dropped
from megatron_longpo.errors import UserError
from megatron_longpo.generation.documents.encodings import decode_text

_SAMPLE = 1 << 20
_BYTES_PER_TEXT_BYTE = 4
"""Most bytes of a JSONL line for a byte of its text: escapes such as `\\u0436`, other columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """How texts are found in files and data sets."""

    text_column: str = "text"
    subset: str | None = None
    split: str | None = None
    encoding: str | None = None
    max_bytes: int = 16_000_000
    key: str = "documents"
    """The setting whose value the path is, for messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """What one place of a source holds: a text, or the reason why not."""

    source: str
    """`file`, `file:line` or `table[row]`, for messages."""
    name: str
    """The file's name, whose ending tells what the text is; empty for rows."""
    text: str | None
    fault: str = ""


class TextFile:
    """Reads a file as one document; `.gz` is unpacked."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self._path, self._options = path, options

    def check(self) -> None:
        """Does nothing: a text has no columns that could be missing in all files."""

    def size_hint(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Read]:
        name = self._path.name.removesuffix(".gz")
        text, fault = None, ""
        try:
            text = self._text()
        except Dropped as dropped:
            fault = str(dropped)
        yield Read(source=str(self._path), name=name, text=text, fault=fault)

    def _text(self) -> str:
        limit = self._options.max_bytes
        try:
            if not stat.S_ISREG(os.stat(self._path).st_mode):
                raise Dropped("neither file nor folder")  # a pipe would be waited for
            with _open(self._path) as file:
                data = file.read(limit + 1)
        except (OSError, EOFError, zlib.error):
            raise Dropped("unreadable file") from None
        if len(data) > limit:
            raise Dropped("document over max_document_bytes")
        return decode_text(data, encoding=self._options.encoding)


class JsonlFile:
    """Reads a document a line: an object with its text in a column; `.gz` is unpacked."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self._path, self._options = path, options
        self._limit = options.max_bytes * _BYTES_PER_TEXT_BYTE

    def check(self) -> None:
        """Raises `UserError` if the first object has no such column."""
        for number, line in self._lines():
            try:
                value = json.loads(line or b"")
            except (ValueError, RecursionError):
                continue
            column = self._options.text_column
            if isinstance(value, dict) and column not in value:
                raise _no_column(f"{self._path}:{number}", column, list(value))
            return

    def size_hint(self) -> int:
        try:
            with _open(self._path) as file:
                sample = file.read(_SAMPLE)
                # Of a packed file, how much of it the sample took.
                packed = getattr(file, "fileobj", file)
                read = packed.tell() if packed is not file else len(sample)
        except (OSError, EOFError, zlib.error):
            return 0
        lines = sum(1 for line in sample.split(b"\n") if line.strip())
        if len(sample) < _SAMPLE:
            return lines
        return max(lines, round(lines * self._path.stat().st_size / max(1, read)))

    def __iter__(self) -> Iterator[Read]:
        for number, line in self._lines():
            text, fault = None, ""
            try:
                text = self._text(line)
            except Dropped as dropped:
                fault = str(dropped)
            yield Read(source=f"{self._path}:{number}", name="", text=text, fault=fault)

    def _lines(self) -> Iterator[tuple[int, bytes | None]]:
        """Yields lines that are not blank with their numbers; None for one over the limit."""
        number = 0
        try:
            with _open(self._path) as file:
                while line := file.readline(self._limit):
                    number += 1
                    whole = line.endswith(b"\n") or len(line) < self._limit
                    while not whole:
                        rest = file.readline(_SAMPLE)
                        whole = rest.endswith(b"\n") or len(rest) < _SAMPLE
                        line = b""
                    if line.strip() or not line:
                        yield number, line or None
        except (OSError, EOFError, zlib.error):
            yield number + 1, b""

    def _text(self, line: bytes | None) -> str:
        if line is None:
            raise Dropped("document over max_document_bytes")
        if not line:
            raise Dropped("unreadable file")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise Dropped("line that is no JSON object") from None
        if not isinstance(value, dict):
            raise Dropped("line that is no JSON object")
        return _checked_text(value.get(self._options.text_column), self._options)


class ParquetTable:
    """Reads a document a row; only the column with the text is read."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self._path, self._options = path, options

    def check(self) -> None:
        """Raises `UserError` if there is no such column."""
        table = self._open()
        if table is not None:
            _check_column(str(self._path), self._options.text_column, table.schema_arrow.names)

    def size_hint(self) -> int:
        table = self._open()
        return 0 if table is None else int(table.metadata.num_rows)

    def __iter__(self) -> Iterator[Read]:
        import pyarrow as pa

        table, row = self._open(), 0
        try:
            if table is None:
                raise OSError
            column = self._options.text_column
            for batch in table.iter_batches(batch_size=64, columns=[column]):
                for value in batch.column(0).to_pylist():
                    yield _row(f"{self._path}[{row}]", value, self._options)
                    row += 1
        except (OSError, pa.ArrowException):
            yield Read(source=f"{self._path}[{row}]", name="", text=None, fault="unreadable file")

    def _open(self) -> Any:
        import pyarrow as pa
        from pyarrow import parquet

        try:
            return parquet.ParquetFile(self._path)
        except (OSError, pa.ArrowException):
            return None


class HubDataset:
    """Reads the rows of a `datasets` data set, from a `save_to_disk` folder or the hub."""

    def __init__(self, dataset: Any, name: str, options: ReadOptions) -> None:
        self._dataset, self._name, self._options = dataset, name, options

    def check(self) -> None:
        """Raises `UserError` if there is no such column."""
        columns = self._dataset.column_names
        if columns is None:  # a stream knows them when its first row comes
            columns = list(next(iter(self._dataset), {}))
        _check_column(self._name, self._options.text_column, columns)

    def size_hint(self) -> int:
        try:
            return len(self._dataset)
        except TypeError:
            pass
        splits = getattr(self._dataset.info, "splits", None) or {}
        split = splits.get(str(self._dataset.split))
        return 0 if split is None else int(split.num_examples or 0)

    def __iter__(self) -> Iterator[Read]:
        column = self._options.text_column
        for row, value in enumerate(self._dataset.select_columns([column])):
            yield _row(f"{self._name}[{row}]", value.get(column), self._options)


Source = TextFile | JsonlFile | ParquetTable | HubDataset
"""All have `check()`, which finds missing columns before anything expensive, `size_hint()`, which
returns about how many documents there are, and iteration."""


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _row(source: str, value: object, options: ReadOptions) -> Read:
    try:
        return Read(source=source, name="", text=_checked_text(value, options))
    except Dropped as dropped:
        return Read(source=source, name="", text=None, fault=str(dropped))


def _checked_text(value: object, options: ReadOptions) -> str:
    if not isinstance(value, str):
        raise Dropped(f"row without a text in {options.text_column}")
    # Bytes are at least as many as characters, so most texts need not be encoded to be measured.
    if len(value) * 4 > options.max_bytes and (
        len(value) > options.max_bytes
        or len(value.encode("utf-8", "surrogatepass")) > options.max_bytes
    ):
        raise Dropped("document over max_document_bytes")
    return value


def _check_column(where: str, column: str, columns: list[str]) -> None:
    if column not in columns:
        raise _no_column(where, column, columns)


def _no_column(where: str, column: str, columns: list[str]) -> UserError:
    names = ", ".join(columns) or "no columns"
    return UserError(f"{where}: has no column {column}, only {names}; set text_column")
