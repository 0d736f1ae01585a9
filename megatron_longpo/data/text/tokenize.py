"""`longpo tokenize`: turns preference examples into the rows that training reads.

text/example_rows.py makes the row of one example; this file deals the examples to worker processes,
writes the rows and counts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_longpo.config.names import TextFormat
from megatron_longpo.config.tokenize import TokenizeConfig
from megatron_longpo.data.jsonl import refuse_existing, write_lines
from megatron_longpo.data.progress import Dropped, track
from megatron_longpo.data.rows.writing import row_line, row_table, write_rows_dataset
from megatron_longpo.data.text.dpo_sets import DpoPair
from megatron_longpo.data.text.example_rows import dpo_row, example_row
from megatron_longpo.data.text.renderings import TemplateChangesText
from megatron_longpo.data.text.sets import TextSet
from megatron_longpo.data.text.tokenizers import load_tokenizer
from megatron_longpo.data.workers import WorkerPool, usable_cpus
from megatron_longpo.errors import UserError

WORKER_IMPORTS = (__name__, "transformers.models.auto.tokenization_auto")
"""Modules that a worker needs and that are slow to import."""

CHUNK_SIZES: dict[TextFormat, int] = {"longpo": 1, "dpo": 32}
"""Examples that a worker gets at a time: documents are long, pairs of a DPO set are short."""

_EXAMPLES_PER_WORKER = 16
"""Starting a worker takes as long as tokenising this many long documents: seconds."""


@dataclass(kw_only=True)
class TokenizeSummary:
    """Counts of rows and of dropped examples."""

    num_rows: int = 0
    num_without_short_rows: int = 0
    num_cut_documents: int = 0
    longest: int = 0
    """Tokens of the longest long row."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Examples by the reason why they gave no row."""
    first_dropped: dict[str, str] = field(default_factory=dict)
    """Where the first example of each reason is from."""

    def __str__(self) -> str:
        lines = f"{self.num_rows} rows, the longest of {self.longest} tokens"
        if self.num_without_short_rows:
            lines += f"; {self.num_without_short_rows} have no short rows"
        if self.num_cut_documents:
            lines += f"; {self.num_cut_documents} documents cut"
        if self.dropped:
            lines += f"; dropped {self.dropped.total()}: {self.reasons()}"
        return lines

    def drop(self, reason: str, source: str) -> None:
        """Counts an example that gave no row."""
        self.dropped[reason] += 1
        self.first_dropped.setdefault(reason, source)

    def reasons(self) -> str:
        """Returns `3 x empty answer (first: pairs.jsonl:7)`, the most frequent first."""
        return ", ".join(
            f"{number} x {reason} (first: {self.first_dropped[reason]})"
            for reason, number in self.dropped.most_common()
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The row of one example, or why there is none."""

    source: str
    """Where the example is from."""
    dropped: str | None = None
    """The reason why there is no row; the fields below are then meaningless."""
    encoded: Any = None
    """The row ready to be written: a line of JSONL, or a table of one row."""
    num_tokens: int = 0
    """Of the longer long row."""
    has_short_rows: bool = False
    document_cut: bool = False


class ExampleTokenizer:
    """Makes the row of an example by its index in a set; every worker process has one."""

    def __init__(self, examples: TextSet, config: TokenizeConfig) -> None:
        self._examples = examples
        self._config = config
        self._tokenizer = load_tokenizer(config.tokenizer, chat_template=config.chat_template)
        self._encode = row_line if writes_lines(config) else row_table

    def __call__(self, index: int) -> Outcome:
        """Makes one row. Raises `UserError` if the example or the chat template is unusable."""
        source = self._examples.where(index)
        document_cut = False
        try:
            example = self._examples[index]
            if isinstance(example, DpoPair):
                row = dpo_row(example, self._tokenizer, self._config)
            else:
                row, document_cut = example_row(example, self._tokenizer, self._config)
        except Dropped as dropped:
            return Outcome(source=source, dropped=str(dropped))
        except TemplateChangesText:
            return Outcome(source=source, dropped="text changed by the chat template")
        return Outcome(
            source=source,
            encoded=self._encode(row),
            num_tokens=max(len(row.chosen), len(row.rejected)),
            has_short_rows=bool(row.reference_chosen),
            document_cut=document_cut,
        )


def run_tokenize(config: TokenizeConfig) -> TokenizeSummary:
    """Reads the examples, writes the rows and prints counts."""
    refuse_existing(config.output, overwrite=config.overwrite, key="output")
    examples = TextSet(config.examples, format=config.format, split=config.split)
    print(f"{config.examples}: {examples.description}")
    num_workers = choose_num_workers(config.num_workers, len(examples))
    # Made here in any case, so that an error of the tokenizer is raised once.
    make_task = partial(ExampleTokenizer, examples, config)
    task = make_task()
    indices = range(len(examples))
    if num_workers == 1:
        return write_outcomes(map(task, indices), examples, config)
    with WorkerPool(make_task, num_workers=num_workers, imports=WORKER_IMPORTS) as pool:
        outcomes = pool.map(indices, chunk_size=CHUNK_SIZES[examples.format])
        return write_outcomes(outcomes, examples, config)


def choose_num_workers(asked: int | None, num_examples: int) -> int:
    """Returns `asked`, or if that is None one worker a CPU, as far as there is work for them."""
    if asked is None:
        asked = min(usable_cpus(), num_examples // _EXAMPLES_PER_WORKER)
    return max(1, min(asked, num_examples))


def writes_lines(config: TokenizeConfig) -> bool:
    """Tells by its name whether the output is JSONL."""
    return Path(config.output).suffix in (".jsonl", ".json")


def write_outcomes(
    outcomes: Iterable[Outcome], examples: TextSet, config: TokenizeConfig
) -> TokenizeSummary:
    """Writes the rows in order and prints counts."""
    summary = TokenizeSummary()
    rows = _counted(track(outcomes, description="tokenize", total=len(examples)), config, summary)
    if writes_lines(config):
        write_lines(config.output, rows)
    else:
        write_rows_dataset(Path(config.output), rows)
    print(f"{config.output}: {summary}")
    return summary


def _counted(
    outcomes: Iterable[Outcome], config: TokenizeConfig, summary: TokenizeSummary
) -> Iterator[Any]:
    """Yields the encoded rows and counts in `summary`; raises if there is no row."""
    for outcome in outcomes:
        if outcome.dropped is not None:
            summary.drop(outcome.dropped, outcome.source)
            continue
        summary.num_rows += 1
        summary.num_without_short_rows += not outcome.has_short_rows
        summary.num_cut_documents += outcome.document_cut
        summary.longest = max(summary.longest, outcome.num_tokens)
        yield outcome.encoded
    if summary.num_rows == 0:
        raise UserError(f"{config.examples}: no example gave a row (dropped: {summary.reasons()})")
