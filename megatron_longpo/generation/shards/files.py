"""Shard files: the documents that one process has finished, a line each, safe from SIGKILL.

A line holds everything about its document: the example or why there is none, and how long the
texts are. It is written at once and counts only with its line end, so a document is finished as a
whole or not at all. `fsync` follows at most `SYNC_SECONDS` later and at the end: a killed
process loses nothing that was finished, a machine that loses power at most those seconds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_longpo.config.generate import shard_place
from megatron_longpo.data.jsonl import disk_errors, dump_line
from megatron_longpo.data.text.examples import Example, example_columns
from megatron_longpo.errors import UserError
from megatron_longpo.generation.shards.example_lengths import ExampleLengths

SYNC_SECONDS = 5.0

KEPT = "what is finished is kept: free some space and give the same command again"
"""What to do if the disk is full."""

_EXAMPLE_KEY = b',"example":'
"""Occurs once in a line, before the example: inside a JSON string its quotes would be escaped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Every `count`-th document, from number `index` on."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def file(self, folder: Path) -> Path:
        return folder / f"shard-{self.index}-of-{self.count}.jsonl"

    def lock(self, folder: Path) -> Path:
        return self.file(folder).with_suffix(".lock")


def parse_shard(text: str | None) -> Shard:
    """Reads `i/n`; None is the only shard."""
    index, count = shard_place(text)
    return Shard(index=index, count=count)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What became of one document."""

    number: int
    """`Document.place`; the final file is in this order."""
    id: str
    dropped: dict[str, int] = field(default_factory=dict)
    """Why chunks and turns, or the whole document, gave nothing."""
    lengths: ExampleLengths | None = None
    """None if the document gave no example."""
    seconds: float = 0.0
    """Time spent on the shard when this was finished, over all its runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """A shard's last line: it has seen every document."""

    num_places: int
    """Files, lines and rows that were read, those of all shards together."""
    dropped: dict[str, int]
    """Documents of this shard that could not be used, by reason."""
    put_aside: dict[str, int]
    """Documents of this shard that a backend failed on, by reason; they are not finished."""
    seconds: float
    """Time spent on this shard, over all its runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a shard file, and the place of its example."""

    content: Record | End
    start: int
    end: int
    """`[start, end)` in bytes is the example's JSON; empty if there is none."""


def read_lines(path: Path) -> Iterator[Line]:
    """Reads a shard file, without a last line that has no end; a missing file has no lines."""
    if not path.exists():
        return
    offset = 0
    with open(path, "rb") as file:
        for number, data in enumerate(file, start=1):
            if not data.endswith(b"\n"):
                return
            yield _parse(data, offset, f"{path}:{number}")
            offset += len(data)


def _parse(data: bytes, offset: int, source: str) -> Line:
    head, key, example = data.partition(_EXAMPLE_KEY)
    try:
        value = json.loads(head + b"}" if key else head)
        if "num_places" in value:
            content: Record | End = End(**value)
        else:
            lengths = value.pop("lengths")
            content = Record(
                **value, lengths=None if lengths is None else ExampleLengths(**lengths)
            )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{source}: is damaged ({error}); remove the line, and its document is written again"
        ) from error
    start = offset + len(head) + len(key)
    # After the example come the brace that closes the line's object and the line end.
    return Line(content=content, start=start, end=start + len(example) - 2 if example else start)


def dump_record(record: Record, example: Example | None) -> bytes:
    """Returns a record as a line, the example last, so that a reader may skip it."""
    value: dict[str, Any] = asdict(record)
    if example is not None:
        value["example"] = example_columns(example)
    return dump_line(value).encode("utf-8")


class ShardWriter:
    """Appends to a shard file and resumes an earlier run's. The caller holds its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[int, Record] = {}
        """Finished documents by their number."""
        self.seconds_before = 0.0
        """Time that earlier runs spent, up to what they finished last."""
        self._size = 0
        for line in read_lines(path):
            self.seconds_before = max(self.seconds_before, line.content.seconds)
            if isinstance(line.content, Record):
                self.done[line.content.number] = line.content
        with self._keeping():
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            self._size = _whole_lines(path)
            os.ftruncate(self._descriptor, self._size)
        self._synced = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._sync()
        finally:
            os.close(self._descriptor)

    def append(self, record: Record, example: Example | None) -> None:
        self._write(dump_record(record, example))
        self.done[record.number] = record
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._sync()

    def end(self, end: End) -> None:
        """Appends that every document was seen; a later run may still add to the file."""
        self._write(dump_line(asdict(end)).encode("utf-8"))
        self._sync()

    def _write(self, line: bytes) -> None:
        with self._keeping():
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
            except BaseException:
                # A line may be half written, as on a full disk.
                os.ftruncate(self._descriptor, self._size)
                raise
            self._size += len(line)

    def _sync(self) -> None:
        with self._keeping():
            os.fsync(self._descriptor)
        self._synced = time.monotonic()

    def _keeping(self) -> AbstractContextManager[None]:
        return disk_errors(self.path, advice=KEPT)


def _whole_lines(path: Path) -> int:
    """Returns the number of bytes up to the last line end."""
    with open(path, "rb") as file:
        position = file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(0, position - (1 << 16))
            file.seek(start)
            found = file.read(position - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            position = start
    return 0
