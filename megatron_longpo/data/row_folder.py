"""Rows into a `datasets` folder, a few at a time."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron_longpo.data.jsonl import dump_line, partial_path
from megatron_longpo.data.rows import PARTS, REFERENCE_COLUMNS, PreferenceRow, row_columns


def write_rows_dataset(folder: Path, rows: Iterable[PreferenceRow]) -> None:
    """Writes a `save_to_disk` folder: first beside it, then renamed.

    The columns of short rows hold nulls for a row without them, and are left out where none has
    any.
    """
    import datasets
    from datasets.arrow_writer import ArrowWriter

    def features(part: str) -> dict[str, datasets.Sequence]:
        kind = datasets.Value("int8" if part == "attention_mask" else "int32")
        row = datasets.Sequence(kind)
        return {
            **{f"{branch}_{part}": row for branch in ("chosen", "rejected")},
            **{
                f"{branch}_{part}": datasets.Sequence(row)
                for branch in ("ref_chosen", "ref_rejected")
            },
        }

    columns: dict[str, object] = {"id": datasets.Value("string")}
    for part in PARTS:
        columns |= features(part)
    partial = partial_path(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        digest = hashlib.blake2b(digest_size=8)
        has_reference = False
        # A row may hold a million integers, so few are kept in memory at a time.
        with ArrowWriter(
            path=str(partial / "rows.arrow"),
            features=datasets.Features(columns),
            writer_batch_size=16,
        ) as writer:
            for row in rows:
                values = row_columns(row)
                digest.update(dump_line(values).encode())
                has_reference |= bool(row.reference_chosen)
                writer.write({**dict.fromkeys(REFERENCE_COLUMNS), **values})
            writer.finalize()
        written = datasets.Dataset.from_file(str(partial / "rows.arrow"))
        if not has_reference:
            written = written.remove_columns(list(REFERENCE_COLUMNS))
        # By default the fingerprint follows the file's time; ours follows the rows.
        dataset = datasets.Dataset(written.data, info=written.info, fingerprint=digest.hexdigest())
        dataset.save_to_disk(str(partial / "dataset"))
        if folder.exists():
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
        os.replace(partial / "dataset", folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
