"""JSON Lines files: random access by byte offsets, and writing that never leaves half a file."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from megatron_longpo.errors import UserError


class JsonlFile:
    """The objects of a JSONL file, parsed on access.

    Opening reads the file once, to note where each line begins and to hash the bytes. The objects
    stay on disk, so the file may be larger than memory. Blank lines are skipped.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._starts = array("q")
        self._line_numbers = array("q")
        digest = hashlib.blake2b(digest_size=16)
        offset = 0
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    digest.update(line)
                    if line.strip():
                        self._starts.append(offset)
                        self._line_numbers.append(number)
                    offset += len(line)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; check the path") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Opened for every read: nothing to share between forked or pickled loader workers.
        with open(self.path, "rb") as file:
            file.seek(self._starts[index])
            line = file.readline()
        try:
            value = json.loads(line)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.where(index)}: not UTF-8 text ({error.reason})") from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(
                f"{self.where(index)}: not a JSON object ({error}); write one object a line"
            ) from error
        if not isinstance(value, dict):
            raise UserError(
                f"{self.where(index)}: holds a JSON {type(value).__name__}, must be an object"
            )
        return value

    def where(self, index: int) -> str:
        """Returns `file:line` of an object, for messages."""
        return f"{self.path}:{self._line_numbers[index]}"


def dump_line(value: Mapping[str, Any]) -> str:
    """Returns one object as one line of JSONL, with its line end."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"


def write_jsonl(path: str | Path, values: Iterable[Mapping[str, Any]]) -> int:
    """Writes all objects to a file beside `path`, then renames it. Returns their number.

    If `values` raises or the disk is full, `path` keeps what it had.
    """
    return write_lines(path, (dump_line(value).encode() for value in values))


def write_lines(path: str | Path, lines: Iterable[bytes]) -> int:
    """Writes lines, which include their line ends, as `write_jsonl` writes objects."""
    count = 0
    with replacing(path) as file:
        for line in lines:
            with disk_errors(path):
                file.write(line)
            count += 1
    return count


@contextmanager
def replacing(path: str | Path, *, partial: Path | None = None) -> Iterator[BinaryIO]:
    """Opens a file that replaces `path` when the block ends. If the block raises, `path` stays.

    Args:
        path: the file that is replaced.
        partial: the file until then, on the same file system; None = `partial_path(path)`.
    """
    partial = partial or partial_path(path)
    try:
        with ExitStack() as stack:
            with disk_errors(path):
                partial.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(_opened(partial))
            yield file
            with disk_errors(path):
                file.flush()
                os.fsync(file.fileno())
        with disk_errors(path):
            os.replace(partial, path)
    except BaseException:
        with suppress(OSError):  # the error that is raised matters, not this one
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    file = open(path, "wb")  # noqa: SIM115
    try:
        yield file
    finally:
        # The disk's error was raised before; closing would raise it again.
        with suppress(OSError):
            file.close()


def write_packed_jsonl(path: str | Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Writes objects as gzipped JSONL, like `write_jsonl`. The same values give the same bytes."""
    with (
        replacing(path) as file,
        gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as packed,
    ):
        for value in values:
            packed.write(dump_line(value).encode())


def write_whole(path: str | Path, content: str) -> None:
    """Writes a text file beside `path`, then renames it."""
    with replacing(path) as file, disk_errors(path):
        file.write(content.encode("utf-8"))


@contextmanager
def disk_errors(
    path: str | Path, *, advice: str = "free some space or choose another place"
) -> Iterator[None]:
    """Turns an OSError of the block (disk full, over quota, read-only) into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); {advice}"
        ) from error


def partial_path(path: str | Path) -> Path:
    """Returns the name of an incomplete file: in the same folder, so that renaming is atomic."""
    path = Path(path)
    return path.with_name(path.name + ".partial")


def refuse_existing(path: str | Path, *, overwrite: bool, key: str) -> None:
    """Raises `UserError` if a target is not empty and `overwrite` is off."""
    path = Path(path)
    if overwrite or not path.exists():
        return
    if any(path.iterdir()) if path.is_dir() else path.stat().st_size > 0:
        raise UserError(
            f"{key} ({path}): exists and is not empty; choose another path or give --overwrite"
        )
