"""Reads documents one at a time, gives each an id, and counts those that are left out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

from megatron_longpo.config.generate import GenerateConfig
from megatron_longpo.config.names import HtmlMode
from megatron_longpo.data.progress import Dropped
from megatron_longpo.errors import UserError
from megatron_longpo.generation.documents.encodings import check_text, is_html
from megatron_longpo.generation.documents.formats import Read, ReadOptions
from megatron_longpo.generation.documents.html import html_to_markdown, require_markdownify
from megatron_longpo.generation.documents.near_duplicates import NearDuplicates
from megatron_longpo.generation.documents.sources import open_sources


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A text and where it came from."""

    id: str
    """A hash of the text: the same text has the same id in any place."""
    text: str
    source: str
    place: int
    """Its number among everything that was read (files, lines, rows), from 0."""
    name: str = ""
    """The file's name, whose ending tells what the text is; empty for a row of a table."""


class DocumentSet:
    """The documents under a path, read one at a time; what cannot be used is counted in `dropped`.

    Every shard reads all of them, so that the first of two like documents is the same for all. That
    takes some 10 ms each, and neither a tokenizer nor a model.
    """

    def __init__(
        self,
        path: str,
        *,
        options: ReadOptions | None = None,
        html: HtmlMode = "drop",
        near_duplicates: float | None = None,
        limit: int | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        """Opens the sources and checks their columns.

        Args:
            path: a file, a folder, a pattern such as `docs/**/*.md`, or a hub id.
            options: how texts are found.
            html: what happens to pages of HTML.
            near_duplicates: least similarity at which a document counts as given twice; None =
                only the same text does.
            limit: most places (files, lines, rows) that are read.
            shard: (i, n): of every n places the one at i, from 0, is this set's.

        Raises:
            UserError: the path holds nothing, or a file has no such column.
        """
        options = options or ReadOptions()
        self._sources, self._faults = open_sources(path, options)
        self._html = html
        self._near_duplicates = near_duplicates
        self._limit = limit
        self._shard, self._num_shards = shard
        self.num_places = 0
        """Files, lines and rows read so far, also those of other shards."""
        self.dropped: Counter[str] = Counter()
        self.first_dropped: dict[str, str] = {}
        """An example of each reason, for the warning."""
        if not self._sources:
            raise UserError(f"{options.key} ({path}): holds no files; give a folder of text files")
        for source in self._sources:
            source.check()
        if near_duplicates is not None:
            NearDuplicates(near_duplicates)  # says so if the library is missing
        if html == "extract":
            require_markdownify()

    def __length_hint__(self) -> int:
        """Returns about how many places there are, for a progress bar; 0 if unknown."""
        total = len(self._faults) + sum(source.size_hint() for source in self._sources)
        if self._limit is not None:
            total = min(total, self._limit) if total else self._limit
        return -(-total // self._num_shards)

    def __iter__(self) -> Iterator[Document]:
        self.num_places = 0
        self.dropped.clear()
        self.first_dropped.clear()
        seen: set[bytes] = set()
        alike = None if self._near_duplicates is None else NearDuplicates(self._near_duplicates)
        places = chain(chain.from_iterable(self._sources), self._faults)
        for place, read in enumerate(islice(places, self._limit)):
            self.num_places += 1
            is_ours = place % self._num_shards == self._shard
            try:
                document = self._document(read, seen, place)
            except Dropped as dropped:
                if is_ours:
                    self._drop(str(dropped), read.source)
                continue
            other = None if alike is None else alike.add(document.source, document.text)
            if other is not None:
                if is_ours:
                    self._drop("near-duplicate", f"{document.source} (like {other})")
            elif is_ours:
                yield document

    def _document(self, read: Read, seen: set[bytes], place: int) -> Document:
        if read.text is None:
            raise Dropped(read.fault)
        text = read.text
        check_text(text)
        name = read.name
        if self._html != "keep" and is_html(text):
            if self._html == "drop":
                raise Dropped("HTML page")
            text, name = html_to_markdown(text), "page.md"
            check_text(text)
        digest = hashlib.sha256(text.encode()).digest()
        if digest[:16] in seen:
            raise Dropped("document given twice")
        seen.add(digest[:16])
        return Document(id=digest.hex()[:16], text=text, source=read.source, place=place, name=name)

    def _drop(self, reason: str, source: str) -> None:
        self.dropped[reason] += 1
        self.first_dropped.setdefault(reason, source)


def open_documents(config: GenerateConfig, *, shard: tuple[int, int] = (0, 1)) -> DocumentSet:
    """Opens the documents of a config; raises `UserError` if there are none."""
    return DocumentSet(
        config.documents,
        options=ReadOptions(
            text_column=config.text_column,
            subset=config.subset,
            split=config.split,
            encoding=config.encoding,
            max_bytes=config.max_document_bytes,
        ),
        html=config.html,
        near_duplicates=config.near_duplicates,
        limit=config.limit,
        shard=shard,
    )
