"""Writes rows to JSONL or to a `datasets` folder, a few in memory at a time."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_longpo.data.jsonl import disk_errors, partial_path, write_lines
from megatron_longpo.data.rows.schema import (
    LONG_COLUMNS,
    REFERENCE_COLUMNS,
    PreferenceRow,
    row_arrays,
)


def row_line(row: PreferenceRow) -> bytes:
    """Returns the row as one line of JSONL, with its line end."""
    return orjson.dumps(
        row_arrays(row), option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    )


def write_rows_jsonl(path: str | Path, rows: Iterable[PreferenceRow]) -> int:
    """Writes rows to a JSONL file (first beside it, then renamed). Returns their number."""
    return write_lines(path, (row_line(row) for row in rows))


def row_table(row: PreferenceRow) -> Any:
    """Returns a `pyarrow.Table` of one row; nulls stand for short rows that it lacks."""
    import pyarrow as pa

    columns = row_arrays(row)
    arrays = {"id": pa.array([row.id])}
    for name in LONG_COLUMNS:
        arrays[name] = _list_array([columns[name]], _value_type(name))
    for name in REFERENCE_COLUMNS:
        if name in columns:
            turns = _list_array(columns[name], _value_type(name))
            arrays[name] = pa.ListArray.from_arrays(np.array([0, len(turns)], np.int32), turns)
        else:
            arrays[name] = pa.nulls(1, pa.list_(pa.list_(_value_type(name))))
    return pa.table(arrays)


def _value_type(column: str) -> Any:
    import pyarrow as pa

    return pa.int8() if column.endswith("attention_mask") else pa.int32()


def _list_array(values: list[np.ndarray], value_type: Any) -> Any:
    """Returns a list for each array, without making a Python object for each number."""
    import pyarrow as pa

    ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
    numbers = np.concatenate(values).astype(value_type.to_pandas_dtype())
    return pa.ListArray.from_arrays(ends, pa.array(numbers))


def _update(digest: Any, table: Any) -> None:
    digest.update(table.column("id")[0].as_py().encode("utf-8", "surrogatepass") + b"\0")
    for name in (*LONG_COLUMNS, *REFERENCE_COLUMNS):
        values = table.column(name).chunk(0)
        while hasattr(values, "values"):
            digest.update(values.offsets.to_numpy())
            values = values.values
        digest.update(values.to_numpy())


def write_rows_dataset(folder: Path, tables: Iterable[Any]) -> None:
    """Writes a `save_to_disk` folder of `row_table`s: first beside it, then renamed.

    If no row has short rows, the folder has no columns for them.
    """
    import datasets

    partial = partial_path(folder)
    with disk_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        rows = partial / "rows.arrow"
        fingerprint, has_reference = _write_rows(rows, tables, folder)
        with disk_errors(folder):
            written = datasets.Dataset.from_file(str(rows))
            if not has_reference:
                written = written.remove_columns(list(REFERENCE_COLUMNS))
            # The default fingerprint depends on the file's time; ours depends on the rows.
            dataset = datasets.Dataset(written.data, info=written.info, fingerprint=fingerprint)
            dataset.save_to_disk(str(partial / "dataset"))
            if folder.exists():
                shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
            os.replace(partial / "dataset", folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_rows(path: Path, tables: Iterable[Any], folder: Path) -> tuple[str, bool]:
    """Writes an Arrow file. Returns a hash of its rows and whether any has short ones."""
    from datasets.arrow_writer import ArrowWriter

    digest = hashlib.blake2b(digest_size=8)
    has_reference = False
    # A row may hold a million integers, so few are kept in memory at a time.
    with disk_errors(folder):
        writer = ArrowWriter(path=str(path), writer_batch_size=16)
    try:
        for table in tables:
            _update(digest, table)
            has_reference |= table.column(REFERENCE_COLUMNS[0]).null_count == 0
            with disk_errors(folder):
                writer.write_row(table)
        with disk_errors(folder):
            writer.finalize()
    finally:
        # The disk's error was raised before; closing would raise it again.
        with suppress(OSError):
            writer.close()
    return digest.hexdigest(), has_reference
