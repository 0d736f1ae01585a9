"""Joins shard files to the examples file, in the documents' order, with summary and report."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_longpo.data.jsonl import disk_errors, partial_path, replacing
from megatron_longpo.data.progress import format_counts
from megatron_longpo.data.text.examples import Example, check_example
from megatron_longpo.errors import UserError
from megatron_longpo.generation.report.page import write_report
from megatron_longpo.generation.report.summary import GenerateSummary, summarise
from megatron_longpo.generation.shards.files import End, Record, Shard, read_lines
from megatron_longpo.generation.shards.locks import hold
from megatron_longpo.generation.shards.manifest import MANIFEST_FILE

MERGE_LOCK = "merge.lock"

NUM_SAMPLES = 3
"""Whole examples in a report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A finished document, and the place of its example."""

    record: Record
    file: Path
    start: int
    end: int

    def example_bytes(self) -> bytes:
        """Reads the example's JSON."""
        with open(self.file, "rb") as file:
            file.seek(self.start)
            return file.read(self.end - self.start)

    def example(self) -> Example:
        return check_example(json.loads(self.example_bytes()), source=str(self.file))


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """The documents that the shards of a folder have finished."""

    finished: list[Finished]
    """In the documents' order."""
    ends: list[End]
    unended: list[Shard]
    """Shards that have documents left."""
    seconds: float
    """Time spent on all shards, up to what each has finished last."""

    @property
    def examples(self) -> list[Finished]:
        return [one for one in self.finished if one.record.lengths is not None]

    @property
    def is_complete(self) -> bool:
        return not self.unended and not any(end.put_aside for end in self.ends)

    def summary(self) -> GenerateSummary:
        return summarise((one.record for one in self.finished), self.ends, seconds=self.seconds)


def collect(folder: Path, *, num_shards: int) -> Collected:
    """Reads all shard files of a folder; their examples stay on disk."""
    finished: dict[int, Finished] = {}
    ends: dict[int, End] = {}
    seconds = [0.0] * num_shards
    for shard in _shards(num_shards):
        file = shard.file(folder)
        for line in read_lines(file):
            seconds[shard.index] = max(seconds[shard.index], line.content.seconds)
            if isinstance(line.content, End):
                ends[shard.index] = line.content
                continue
            ends.pop(shard.index, None)  # a later run found more documents, and has not ended
            number = line.content.number
            finished[number] = Finished(
                record=line.content, file=file, start=line.start, end=line.end
            )
    # A shard that ended before documents were added has some left.
    most = max((end.num_places for end in ends.values()), default=0)
    ends = {index: end for index, end in ends.items() if end.num_places == most}
    return Collected(
        finished=[finished[number] for number in sorted(finished)],
        ends=list(ends.values()),
        unended=[shard for shard in _shards(num_shards) if shard.index not in ends],
        seconds=sum(seconds),
    )


def _shards(num_shards: int) -> Iterator[Shard]:
    return (Shard(index=index, count=num_shards) for index in range(num_shards))


def merge(
    output: Path, *, num_shards: int, report: bool, unfinished: bool = False
) -> GenerateSummary | None:
    """Writes output, summary and report from `output.partial`; removes that if it is complete.

    Args:
        output: the examples file.
        num_shards: of the folder.
        report: whether to write the HTML page.
        unfinished: write what is finished; the folder stays, and a later run resumes from it.

    Returns:
        None if shards or documents are left and `unfinished` is not set, or if another shard has
        merged first.
    """
    folder = partial_path(output)
    with hold(folder / MERGE_LOCK, what=str(output), wait=True):
        if not (folder / MANIFEST_FILE).exists():
            # Merged and removed by another shard while this one waited; the lock made it anew.
            (folder / MERGE_LOCK).unlink()
            with contextlib.suppress(OSError):
                folder.rmdir()
            return None
        collected = collect(folder, num_shards=num_shards)
        if not collected.is_complete and not unfinished:
            return None
        summary = collected.summary()
        if not collected.examples:
            if collected.is_complete:
                shutil.rmtree(folder)
            raise UserError(
                f"{output}: the documents gave no example (dropped: "
                f"{format_counts(summary.dropped)}); see documents, chunk_min_tokens and "
                "chunk_max_tokens, or filters, by what was dropped"
            )
        summary.write(summary_path(output))
        if report:
            write_report(
                report_path(output),
                title=output.name,
                summary=summary,
                lengths=[one.record.lengths for one in collected.examples if one.record.lengths],
                samples=[one.example() for one in _spread(collected.examples, NUM_SAMPLES)],
            )
        with replacing(output, partial=folder / "merged.jsonl") as file:
            for one in collected.examples:
                line = one.example_bytes() + b"\n"
                with disk_errors(output):
                    file.write(line)
        if collected.is_complete:
            shutil.rmtree(folder)
        else:
            _warn(folder, collected)
    return summary


def summary_path(output: Path) -> Path:
    return output.with_name(f"{output.stem}.summary.json")


def report_path(output: Path) -> Path:
    return output.with_name(f"{output.stem}.report.html")


def _spread(examples: Sequence[Finished], number: int) -> list[Finished]:
    """Chooses examples at even distances over the list, in order."""
    number = min(number, len(examples))
    return [examples[(2 * index + 1) * len(examples) // (2 * number)] for index in range(number)]


def _warn(folder: Path, collected: Collected) -> None:
    left = [f"shard {shard} has not ended" for shard in collected.unended]
    aside = Counter[str]()
    for end in collected.ends:
        aside.update(end.put_aside)
    left += [f"{number} put aside: {reason}" for reason, number in aside.items()]
    print(
        f"warning: without what is unfinished ({'; '.join(left)}); {folder} stays, so that the "
        "same command without --merge can resume",
        file=sys.stderr,
    )
