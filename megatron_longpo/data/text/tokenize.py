"""`longpo tokenize`: preference examples to the rows that training reads.

The long conversations hold the document in their first turn and the branch's own earlier answers
after it. The short ones, one for each turn, hold the chunk, the question and the answer; there are
none where the examples have no chunks, as in plain DPO sets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_longpo.config.tokenize import TokenizeConfig
from megatron_longpo.data.jsonl import refuse_existing, write_lines
from megatron_longpo.data.progress import Dropped, format_counts, track
from megatron_longpo.data.rows.writing import row_line, row_table, write_rows_dataset
from megatron_longpo.data.text.dpo_sets import DpoPair
from megatron_longpo.data.text.example_rows import dpo_row, example_row
from megatron_longpo.data.text.renderings import TemplateChangesText
from megatron_longpo.data.text.sets import TextFormat, TextSet
from megatron_longpo.data.text.tokenizers import load_tokenizer
from megatron_longpo.data.workers import WorkerPool, usable_cpus
from megatron_longpo.errors import UserError

WORKER_IMPORTS = (__name__, "transformers.models.auto.tokenization_auto")
"""What a worker needs and takes long to import."""

CHUNK_SIZES: dict[TextFormat, int] = {"longpo": 1, "dpo": 32}
"""Examples that a worker gets at a time: documents are long and pairs of a DPO set short."""

_EXAMPLES_PER_WORKER = 16
"""A worker takes seconds to start, in which this many long documents are tokenised."""


@dataclass(kw_only=True)
class TokenizeSummary:
    """What became of the examples."""

    num_rows: int = 0
    num_without_short_rows: int = 0
    num_cut_documents: int = 0
    longest: int = 0
    """Tokens of the longest long row."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Examples by the reason why they gave no row."""

    def __str__(self) -> str:
        lines = f"{self.num_rows} rows, the longest of {self.longest} tokens"
        if self.num_without_short_rows:
            lines += f"; {self.num_without_short_rows} have no short rows"
        if self.num_cut_documents:
            lines += f"; {self.num_cut_documents} documents cut"
        if self.dropped:
            lines += f"; dropped {self.dropped.total()}: {format_counts(self.dropped)}"
        return lines


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one example."""

    dropped: str | None = None
    """The reason why it gave no row; what follows then stands for nothing."""
    encoded: Any = None
    """The row as it is written: a line of JSONL, or a table of one row."""
    num_tokens: int = 0
    """Of the longer long row."""
    has_short_rows: bool = False
    document_cut: bool = False


class ExampleTokenizer:
    """Makes the row of an example of a set by its index; every worker process has one."""

    def __init__(self, examples: TextSet, config: TokenizeConfig) -> None:
        self._examples = examples
        self._config = config
        self._tokenizer = load_tokenizer(config.tokenizer, chat_template=config.chat_template)
        self._encode = row_line if writes_lines(config) else row_table

    def __call__(self, index: int) -> Outcome:
        """Raises `UserError` where the example, or the template that it meets, is unusable."""
        example = self._examples[index]
        document_cut = False
        try:
            if isinstance(example, DpoPair):
                row = dpo_row(example, self._tokenizer, self._config)
            else:
                row, document_cut = example_row(example, self._tokenizer, self._config)
        except Dropped as dropped:
            return Outcome(dropped=str(dropped))
        except TemplateChangesText:
            return Outcome(dropped="text changed by the chat template")
        return Outcome(
            encoded=self._encode(row),
            num_tokens=max(len(row.chosen), len(row.rejected)),
            has_short_rows=bool(row.reference_chosen),
            document_cut=document_cut,
        )


def run_tokenize(config: TokenizeConfig) -> TokenizeSummary:
    """Reads the examples, writes the rows and prints what became of them."""
    for key in ("max_length", "short_max_length"):
        if getattr(config, key) < 2:
            raise UserError(f"{key} ({getattr(config, key)}): must be at least 2 tokens")
    if config.num_workers is not None and config.num_workers < 1:
        raise UserError(f"num_workers ({config.num_workers}): must be at least 1, or null")
    refuse_existing(config.output, overwrite=config.overwrite, key="output")
    examples = TextSet(config.examples, format=config.format, split=config.split)
    print(f"{config.examples}: {examples.description}")
    num_workers = choose_num_workers(config.num_workers, len(examples))
    # Made here in any case, so that what is wrong with the tokenizer is said once.
    make_task = partial(ExampleTokenizer, examples, config)
    task = make_task()
    indices = range(len(examples))
    if num_workers == 1:
        return write_outcomes(map(task, indices), examples, config)
    with WorkerPool(make_task, num_workers=num_workers, imports=WORKER_IMPORTS) as pool:
        outcomes = pool.map(indices, chunk_size=CHUNK_SIZES[examples.format])
        return write_outcomes(outcomes, examples, config)


def choose_num_workers(asked: int | None, num_examples: int) -> int:
    """The workers that are asked for, or one a CPU, as far as starting them is worth it."""
    if asked is None:
        asked = min(usable_cpus(), num_examples // _EXAMPLES_PER_WORKER)
    return max(1, min(asked, num_examples))


def writes_lines(config: TokenizeConfig) -> bool:
    """Whether the output is JSONL, by its name."""
    return Path(config.output).suffix in (".jsonl", ".json")


def write_outcomes(
    outcomes: Iterable[Outcome], examples: TextSet, config: TokenizeConfig
) -> TokenizeSummary:
    """Writes the rows, in their order, and says what became of the examples."""
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
    """Yields the encoded rows and counts in `summary`; raises where there is none."""
    for outcome in outcomes:
        if outcome.dropped is not None:
            summary.dropped[outcome.dropped] += 1
            continue
        summary.num_rows += 1
        summary.num_without_short_rows += not outcome.has_short_rows
        summary.num_cut_documents += outcome.document_cut
        summary.longest = max(summary.longest, outcome.num_tokens)
        yield outcome.encoded
    if summary.num_rows == 0:
        raise UserError(
            f"{config.examples}: no example gave a row (dropped: {format_counts(summary.dropped)})"
        )
