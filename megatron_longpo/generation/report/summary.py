"""The numbers of a run: documents, examples, drops and lengths."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_longpo.data.jsonl import write_whole
from megatron_longpo.data.progress import format_counts
from megatron_longpo.generation.shards.example_lengths import TOKEN_COUNTS, ExampleLengths
from megatron_longpo.generation.shards.files import End, Record


@dataclass(kw_only=True)
class GenerateSummary:
    """The numbers of one shard, or of all."""

    num_documents: int = 0
    """Documents read, also those dropped at once (binary, empty, twice)."""
    num_resumed: int = 0
    """Documents that an earlier run had finished."""
    num_examples: int = 0
    num_turns: int = 0
    seconds: float = 0.0
    """Time of writing, over all runs and shards."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Documents, chunks and turns by the reason why they gave nothing."""
    put_aside: Counter[str] = field(default_factory=Counter)
    """Documents that a backend failed on, by reason; the next run tries them again."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Turns by the kind of their question."""
    tokens: dict[str, dict[str, float]] = field(default_factory=dict)
    """Least, median, mean and most tokens of documents, chunks, questions and answers."""

    def __str__(self) -> str:
        text = (
            f"{self.num_examples} examples with {self.num_turns} turns from "
            f"{self.num_documents} documents in {self.seconds:.0f} s"
        )
        if self.num_resumed:
            text += f" ({self.num_resumed} documents were done already)"
        if self.dropped:
            text += f"; dropped: {format_counts(self.dropped)}"
        if self.put_aside:
            text += f"; put aside: {format_counts(self.put_aside)}"
        return text

    def write(self, path: Path) -> None:
        values = {key: value for key, value in vars(self).items() if key != "num_resumed"}
        write_whole(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def summarise(records: Iterable[Record], ends: Iterable[End], *, seconds: float) -> GenerateSummary:
    """Sums up finished documents and the shards that have seen all of theirs."""
    summary = GenerateSummary(seconds=round(seconds, 1))
    lengths: list[ExampleLengths] = []
    for record in records:
        summary.num_documents += 1
        summary.dropped.update(record.dropped)
        if record.lengths is not None:
            lengths.append(record.lengths)
            summary.num_turns += record.lengths.num_turns
            summary.kinds.update(record.lengths.kind)
    summary.num_examples = len(lengths)
    for end in ends:
        summary.dropped.update(end.dropped)
        summary.put_aside.update(end.put_aside)
        summary.num_documents += sum(end.dropped.values()) + sum(end.put_aside.values())
    if lengths:
        summary.tokens = {name: _spread(counts_of(lengths, name)) for name in TOKEN_COUNTS}
    return summary


def counts_of(lengths: Iterable[ExampleLengths], name: str) -> list[float]:
    """Returns all values of one length, over documents and turns."""
    values: list[float] = []
    for one in lengths:
        value = getattr(one, name)
        values += value if isinstance(value, list) else [value]
    return values


def _spread(counts: list[float]) -> dict[str, float]:
    return {
        "min": min(counts),
        "median": statistics.median(counts),
        "mean": round(statistics.fmean(counts), 1),
        "max": max(counts),
    }
