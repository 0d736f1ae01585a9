"""Documents: text files of a folder, or the `text` of JSONL lines."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_longpo.data.jsonl import JsonlFile
from megatron_longpo.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A text and where it came from."""

    id: str
    """A hash of the text: the same text has the same id wherever it lies."""
    text: str
    source: str


class DocumentSet:
    """The documents under a path, read one at a time; what cannot be used is counted in `dropped`.

    A folder gives its files in the order of their names, hidden ones left out; `.jsonl` files give
    one document a line.
    """

    def __init__(self, path: str, *, limit: int | None = None) -> None:
        root = Path(path).expanduser()
        if not root.exists():
            raise UserError(f"documents ({path}): no such file or folder")
        files = [root] if root.is_file() else _visible_files(root)
        self._parts: list[tuple[Path, JsonlFile | None, int]] = []
        for file in files:
            if file.suffix == ".jsonl":
                lines = JsonlFile(file)
                self._parts += [(file, lines, index) for index in range(len(lines))]
            else:
                self._parts.append((file, None, 0))
        self._parts = self._parts[:limit]
        self.dropped: Counter[str] = Counter()
        self.first_dropped: dict[str, str] = {}
        """An example of each reason, for the warning."""
        if not self._parts:
            raise UserError(f"documents ({path}): holds no files; give a folder of text files")

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Document]:
        seen: set[str] = set()
        for file, lines, index in self._parts:
            source = str(file) if lines is None else lines.where(index)
            text = self._read(file, source) if lines is None else _line_text(lines, index)
            if text is None:
                continue
            document_id = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
            if not text.strip():
                self._drop("empty document", source)
            elif document_id in seen:
                self._drop("document given twice", source)
            else:
                seen.add(document_id)
                yield Document(id=document_id, text=text, source=source)

    def _read(self, file: Path, source: str) -> str | None:
        try:
            data = file.read_bytes()
        except OSError:
            self._drop("unreadable file", source)
            return None
        if b"\0" in data:
            self._drop("binary file", source)
            return None
        try:
            # utf-8-sig: a byte-order mark is no part of the text.
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            self._drop("file not in UTF-8", source)
            return None

    def _drop(self, reason: str, source: str) -> None:
        self.dropped[reason] += 1
        self.first_dropped.setdefault(reason, source)


def _visible_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _line_text(lines: JsonlFile, index: int) -> str:
    text = lines[index].get("text")
    if not isinstance(text, str):
        raise UserError(f"{lines.where(index)}: text is missing or no string")
    return text
