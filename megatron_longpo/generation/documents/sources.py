"""Where documents come from: files of text, lines, tables, and data sets of the hub."""

from __future__ import annotations

import glob
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
from megatron_longpo.data.rows.sources import HUB_ID, one_split
from megatron_longpo.errors import UserError
from megatron_longpo.generation.documents.decoding import decode_text

_SAMPLE = 1 << 20
_BYTES_PER_TEXT_BYTE = 4
"""Most bytes of a JSONL line for a byte of its text: escapes such as `\\u0436`, other columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """How texts are found in what is read."""

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
    """A file that is one document; `.gz` is unpacked."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self._path, self._options = path, options

    def check(self) -> None:
        """Nothing can be wrong with a text that would be wrong with the next one too."""

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
    """A line, a document: an object with its text in a column; `.gz` is unpacked."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self._path, self._options = path, options
        self._limit = options.max_bytes * _BYTES_PER_TEXT_BYTE

    def check(self) -> None:
        """Raises `UserError` where the first object has no such column."""
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
        """Lines that are not blank with their numbers; None for one over the limit."""
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
    """A row, a document; only the column with the text is read."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self._path, self._options = path, options

    def check(self) -> None:
        """Raises `UserError` where there is no such column."""
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
    """Rows of a `datasets` data set: a `save_to_disk` folder, or streamed from the hub."""

    def __init__(self, dataset: Any, name: str, options: ReadOptions) -> None:
        self._dataset, self._name, self._options = dataset, name, options

    def check(self) -> None:
        """Raises `UserError` where there is no such column."""
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
"""`check()` before anything expensive, `size_hint()` = about how many documents, iteration."""


def open_sources(path: str, options: ReadOptions) -> tuple[list[Source], list[Read]]:
    """The sources under a path, a pattern or a hub id, in the order of their names, and faults.

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


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


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
