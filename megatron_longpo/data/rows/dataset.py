"""Preference rows by index, read from any source and checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_longpo.data.rows.checks import check_row
from megatron_longpo.data.rows.parquet import ParquetSource
from megatron_longpo.data.rows.schema import LONG_COLUMNS, REFERENCE_COLUMNS, PreferenceRow
from megatron_longpo.data.rows.sources import RowSource, open_source
from megatron_longpo.data.rows.splits import TRAIN_SPLITS
from megatron_longpo.errors import UserError


class RowDataset:
    """Rows by index, each checked on access."""

    def __init__(self, source: RowSource, *, name: str) -> None:
        self._source = source
        self.name = name
        """The path or hub id, for messages."""
        self.fingerprint = source.fingerprint
        """A hash of the content, independent of where the data are stored."""

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> PreferenceRow:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        return check_row(
            self._source.columns(index), source=self._source.where(index), default_id=str(index)
        )

    def __iter__(self) -> Iterator[PreferenceRow]:
        return (self[index] for index in range(len(self)))


def open_rows(
    path: str, *, split: str | None = None, default_splits: Sequence[str] = TRAIN_SPLITS
) -> RowDataset:
    """Opens rows: a JSONL file, a `save_to_disk` folder, a Parquet file or folder, or a hub id.

    `open_source` says which split is read.
    """
    keep = (*LONG_COLUMNS, *REFERENCE_COLUMNS, "id")
    source = open_source(path, keep=keep, split=split, default_splits=default_splits)
    if source.column_names is not None:
        missing = [column for column in LONG_COLUMNS if column not in source.column_names]
        if missing:
            table = source.file_without(missing[0]) if isinstance(source, ParquetSource) else path
            raise UserError(
                f"{table}: lacks the column {missing[0]}; rows need {', '.join(LONG_COLUMNS)} "
                "(longpo tokenize makes them from texts)"
            )
    dataset = RowDataset(source, name=path)
    if len(dataset) == 0:
        raise UserError(f"{path}: holds no rows; it needs at least one")
    return dataset
