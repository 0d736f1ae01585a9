"""`longpo generate`: makes preference examples from documents, with the model that is trained.

Chosen answers are written from a chunk and a question, rejected ones from the whole document and
the same question. A finished document is appended to a shard file in `output.partial`, so an
interrupted run resumes; when all shards have ended they become `output`.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections import Counter
from operator import length_hint
from pathlib import Path

from megatron_longpo.config.generate import GenerateConfig
from megatron_longpo.data.jsonl import partial_path, refuse_existing
from megatron_longpo.data.progress import format_counts
from megatron_longpo.errors import StopRequested, UserError
from megatron_longpo.generation.backends.base import BackendError
from megatron_longpo.generation.backends.factory import make_backend
from megatron_longpo.generation.documents.reading import Document, DocumentSet, open_documents
from megatron_longpo.generation.merge import merge
from megatron_longpo.generation.questions.instructions import Instructions
from megatron_longpo.generation.report.summary import GenerateSummary, summarise
from megatron_longpo.generation.shards.failures import RESUMES, FailuresInARow
from megatron_longpo.generation.shards.files import End, Record, Shard, ShardWriter, parse_shard
from megatron_longpo.generation.shards.locks import hold
from megatron_longpo.generation.shards.manifest import (
    MANIFEST_FILE,
    Manifest,
    compare,
    create,
    manifest_of,
    read_manifest,
)
from megatron_longpo.generation.shards.progress import GenerateProgress
from megatron_longpo.generation.writer import ExampleWriter, Written
from megatron_longpo.runtime import stop

POLL_SECONDS = 1.0
"""How soon a stop signal is seen while documents are being written."""


def run_generate(config: GenerateConfig) -> GenerateSummary:
    """Writes the shard's examples, and the examples file if it is the last shard; prints a summary.

    Raises:
        StopRequested: a signal asked to stop; finished documents are saved.
    """
    output, shard = Path(config.output), parse_shard(config.shard)
    folder = partial_path(output)
    if config.merge:
        return _merge_only(config, output)
    _prepare(config, output, shard)
    documents = open_documents(config, shard=(shard.index, shard.count))
    instructions = Instructions(config)
    manifest = manifest_of(config, num_shards=shard.count)
    with hold(shard.lock(folder), what=_name(output, shard)):
        try:
            compare(folder, manifest)
            summary = _write_shard(config, shard, documents, instructions, manifest)
        except KeyboardInterrupt:
            raise StopRequested(f"{_name(output, shard)}: interrupted; {RESUMES}") from None
        finally:
            _remove_if_empty(folder, shard)
    for reason, source in documents.first_dropped.items():
        number = documents.dropped[reason]
        print(f"warning: {number} x {reason}, for one {source}", file=sys.stderr)
    if summary.put_aside:
        raise UserError(
            f"{_name(output, shard)}: {sum(summary.put_aside.values())} documents were put aside "
            f"({format_counts(summary.put_aside)}); the same command tries them again, and --merge "
            f"writes {output} without them"
        )
    merged = merge(output, num_shards=shard.count, report=config.report)
    if merged is None:
        print(f"shard {shard} is done: {summary}. {output} is written when all have ended")
        return summary
    merged.num_resumed = summary.num_resumed
    print(f"{output}: {merged}")
    return merged


def _name(output: Path, shard: Shard) -> str:
    return str(output) if shard.count == 1 else f"shard {shard} of {output}"


# ---------------------------------------------------------------- one shard


def _write_shard(
    config: GenerateConfig,
    shard: Shard,
    documents: DocumentSet,
    instructions: Instructions,
    manifest: Manifest,
) -> GenerateSummary:
    output = Path(config.output)
    folder = partial_path(output)
    with ShardWriter(shard.file(folder)) as file:
        backend = make_backend(config)
        writer = ExampleWriter(backend, config, instructions, fingerprint=manifest.fingerprint)
        create(folder, manifest)
        run = _ShardRun(config, shard, documents, writer, file)
        asyncio.run(run.run())
        if run.was_stopped:
            raise StopRequested(f"{_name(output, shard)}: stopped on request; {RESUMES}")
        end = End(
            num_places=documents.num_places,
            dropped=dict(documents.dropped),
            put_aside=dict(run.put_aside),
            seconds=run.seconds(),
        )
        file.end(end)
        summary = summarise(file.done.values(), [end], seconds=end.seconds)
        summary.num_resumed = run.num_resumed
        return summary


class _ShardRun:
    """Works through a shard's documents, several at the same time if the backend can."""

    def __init__(
        self,
        config: GenerateConfig,
        shard: Shard,
        documents: DocumentSet,
        writer: ExampleWriter,
        file: ShardWriter,
    ) -> None:
        self._config = config
        self._shard = shard
        self._documents = documents
        self._writer = writer
        self._file = file
        self._under_way: dict[asyncio.Task[Written], Document] = {}
        self._failures = FailuresInARow(writer.backend.documents_at_once)
        self._started = time.monotonic()
        self.num_resumed = 0
        self.put_aside: Counter[str] = Counter()
        self.was_stopped = False

    def seconds(self) -> float:
        """Returns the time spent on the shard, in earlier runs too."""
        return round(self._file.seconds_before + time.monotonic() - self._started, 1)

    async def run(self) -> None:
        total = length_hint(self._documents) or None
        description = "generate" if self._shard.count == 1 else f"generate {self._shard}"
        with GenerateProgress(description=description, total=total) as self._progress:
            try:
                for document in self._documents:
                    if not self._is_done(document):
                        await self._begin(document)
                    if stop.was_requested():
                        self.was_stopped = True
                        break
                # After a stop signal too: a document under way has already cost much.
                while self._under_way:
                    await self._some_finish()
            finally:
                for task in self._under_way:
                    task.cancel()
                await self._writer.backend.close()

    def _is_done(self, document: Document) -> bool:
        record = self._file.done.get(document.place)
        if record is None:
            return False
        if record.id != document.id:
            raise UserError(
                f"documents ({self._config.documents}): {document.source} is number "
                f"{document.place} now, and was another when {self._file.path} was begun; give the "
                "documents it was begun with, or --overwrite to begin anew"
            )
        self.num_resumed += 1
        self._progress.resumed()
        return True

    async def _begin(self, document: Document) -> None:
        while len(self._under_way) >= self._writer.backend.documents_at_once:
            await self._some_finish()
        if not stop.was_requested():
            task = asyncio.create_task(self._writer.write(document))
            self._under_way[task] = document

    async def _some_finish(self) -> None:
        finished, _ = await asyncio.wait(
            self._under_way, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        # What is good is saved before what went wrong is raised.
        for task in sorted(finished, key=lambda one: one.exception() is not None):
            document = self._under_way.pop(task)
            try:
                self._save(document, task.result())
            except BackendError as error:
                self._put_aside(document, str(error))

    def _save(self, document: Document, written: Written) -> None:
        record = Record(
            number=document.place,
            id=document.id,
            dropped=dict(written.dropped),
            lengths=written.lengths,
            seconds=self.seconds(),
        )
        self._file.append(record, written.example)
        if written.num_tokens:  # it was asked about
            self._failures.succeeded()
        num_turns = 0 if written.lengths is None else written.lengths.num_turns
        self._progress.finished(num_turns=num_turns, num_tokens=written.num_tokens)

    def _put_aside(self, document: Document, reason: str) -> None:
        self.put_aside[reason] += 1
        self._failures.failed(document.source, reason)
        self._progress.finished(num_turns=0, num_tokens=0)


# ---------------------------------------------------------------- config and files


def _prepare(config: GenerateConfig, output: Path, shard: Shard) -> None:
    """Refuses an output that exists; with `overwrite`, removes what an earlier run left."""
    assert not config.overwrite or shard.count == 1, "config is resolved"
    folder = partial_path(output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output ({output}): {folder} is in the way; remove it")
    if config.overwrite and folder.exists():
        for lock in sorted(folder.glob("*.lock")):
            with hold(lock, what=str(output)):
                pass
        shutil.rmtree(folder)
    # With a folder beside it, the file is what --merge has made of it so far.
    if not (folder / MANIFEST_FILE).exists():
        refuse_existing(output, overwrite=config.overwrite, key="output")


def _merge_only(config: GenerateConfig, output: Path) -> GenerateSummary:
    folder = partial_path(output)
    if not folder.is_dir():
        raise UserError(f"merge (true): there is no {folder}, so nothing that could be merged")
    num_shards = read_manifest(folder).num_shards
    merged = merge(output, num_shards=num_shards, report=config.report, unfinished=True)
    if merged is None:
        raise UserError(f"merge (true): another process has merged {output} just now")
    print(f"{output}: {merged}")
    return merged


def _remove_if_empty(folder: Path, shard: Shard) -> None:
    """Removes the folder if nothing was finished and no other shard has begun, so that other
    settings may be tried."""
    locks = set(folder.glob("shard-*.lock"))
    files = folder.glob("shard-*.jsonl")
    if locks == {shard.lock(folder)} and not any(file.stat().st_size for file in files):
        shutil.rmtree(folder, ignore_errors=True)
