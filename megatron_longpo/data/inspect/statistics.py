"""Statistics over the rows or examples of a set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_longpo.data.common_prefix import common_prefix_length
from megatron_longpo.data.inspect.row_samples import num_turns
from megatron_longpo.data.rows.schema import IGNORED_LABEL, PreferenceRow
from megatron_longpo.data.text.dpo_sets import DpoPair
from megatron_longpo.data.text.examples import Example

NUM_BINS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One number for every row, or for every part of a row."""

    name: str
    unit: str
    values: tuple[float, ...]

    def bins(self) -> tuple[list[int], list[float]]:
        """Returns a histogram: counts, and the borders between them."""
        counts, borders = np.histogram(self.values, bins=NUM_BINS)
        return counts.tolist(), borders.tolist()


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Statistics of the items that were read."""

    num_read: int
    num_items: int
    kind: str
    """rows or examples."""
    series: list[Series]
    notes: list[str]
    """Sentences about turns, savings by sharing, missing parts and duplicates."""


def row_statistics(rows: Iterable[PreferenceRow], num_items: int) -> Statistics:
    """Computes statistics of rows in one pass: a thousand long rows would not fit into memory."""
    lengths: dict[str, list[float]] = {name: [] for name, _ in _ROW_SERIES}
    num_rows = num_without_short = 0
    seen = _Seen("chosen and rejected tokens", "shared prefix", "id")
    for row in rows:
        chosen, rejected = row.chosen.input_ids, row.rejected.input_ids
        shared = common_prefix_length(chosen, rejected)
        num_rows += 1
        num_without_short += not row.reference_chosen
        lengths["chosen row"].append(len(chosen))
        lengths["rejected row"].append(len(rejected))
        lengths["their shared prefix"].append(shared)
        lengths["share of shared prefix"].append(200 * shared / (len(chosen) + len(rejected)))
        lengths["answers of a long row"] += [
            int((tokens.labels != IGNORED_LABEL).sum()) for tokens in (row.chosen, row.rejected)
        ]
        lengths["short reference row"] += map(len, (*row.reference_chosen, *row.reference_rejected))
        lengths["turns"].append(num_turns(row))
        both = len(chosen).to_bytes(8) + chosen.tobytes() + rejected.tobytes()
        seen.add(both, chosen[:shared].tobytes(), row.id.encode("utf-8", "surrogatepass"))
    turns = lengths["turns"]
    saved = sum(lengths["their shared prefix"]) / (
        sum(lengths["chosen row"]) + sum(lengths["rejected row"])
    )
    notes = [
        f"turns a row: {min(turns)} to {max(turns)}; "
        f"sharing the prefix saves {saved:.1%} of the policy's tokens"
    ]
    if num_without_short:
        notes.append(
            f"{num_without_short} of {num_rows} rows have no short reference rows (ref_chosen_*, "
            "ref_rejected_*): for objectives that read none, such as dpo and sft"
        )
    return Statistics(
        num_read=num_rows,
        num_items=num_items,
        kind="rows",
        series=_series(_ROW_SERIES, lengths),
        notes=[*notes, *seen.notes(num_rows)],
    )


def text_statistics(items: Iterable[Example | DpoPair], num_items: int) -> Statistics:
    """Computes the same statistics of texts that are not tokenised yet."""
    lengths: dict[str, list[float]] = {name: [] for name, _ in _TEXT_SERIES}
    num_read = 0
    seen = _Seen("texts", "id")
    for item in items:
        num_read += 1
        if isinstance(item, DpoPair):
            lengths["question"] += [len(m["content"]) for m in item.prompt if m["role"] == "user"]
            lengths["chosen answer"] += [len(m["content"]) for m in item.chosen]
            lengths["rejected answer"] += [len(m["content"]) for m in item.rejected]
            lengths["turns"].append(sum(m["role"] == "assistant" for m in item.chosen))
            texts = repr((item.prompt, item.chosen, item.rejected))
        else:
            lengths["document"].append(len(item.document))
            lengths["chunk"] += [len(turn.chunk) for turn in item.turns if turn.chunk is not None]
            lengths["question"] += [len(turn.question) for turn in item.turns]
            lengths["chosen answer"] += [len(turn.chosen) for turn in item.turns]
            lengths["rejected answer"] += [len(turn.rejected) for turn in item.turns]
            lengths["turns"].append(len(item.turns))
            texts = repr((item.document, item.turns))
        seen.add(*(text.encode("utf-8", "surrogatepass") for text in (texts, item.id)))
    return Statistics(
        num_read=num_read,
        num_items=num_items,
        kind="examples",
        series=_series(_TEXT_SERIES, lengths),
        notes=seen.notes(num_read),
    )


_ROW_SERIES = (
    ("chosen row", "tokens"),
    ("rejected row", "tokens"),
    ("their shared prefix", "tokens"),
    ("share of shared prefix", "%"),
    ("answers of a long row", "tokens"),
    ("short reference row", "tokens"),
    ("turns", ""),
)
_TEXT_SERIES = (
    ("document", "characters"),
    ("chunk", "characters"),
    ("question", "characters"),
    ("chosen answer", "characters"),
    ("rejected answer", "characters"),
    ("turns", ""),
)


def _series(
    named: Sequence[tuple[str, str]], lengths: Mapping[str, Sequence[float]]
) -> list[Series]:
    return [
        Series(name=name, unit=unit, values=tuple(lengths[name]))
        for name, unit in named
        if lengths[name]
    ]


class _Seen:
    """Counts duplicates, by several keys of each item."""

    def __init__(self, *names: str) -> None:
        self._digests: dict[str, set[bytes]] = {name: set() for name in names}

    def add(self, *keys: bytes) -> None:
        for digests, key in zip(self._digests.values(), keys, strict=True):
            digests.add(hashlib.blake2b(key, digest_size=16).digest())

    def notes(self, num_items: int) -> list[str]:
        notes = [
            f"duplicates: {num_items - len(digests)} of {num_items} have the same {name} as an "
            "earlier one"
            for name, digests in self._digests.items()
            if len(digests) < num_items
        ]
        return notes or ["duplicates: none"]
