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

from megatron_longpo.config.names import TextFormat
from megatron_longpo.config.tokenize import TokenizeConfig
from megatron_longpo.data.jsonl import refuse_existing, write_lines
from megatron_longpo.data.progress import Dropped, format_counts, track
from megatron_longpo.data.rows.dataset import PreferenceRow, TokenRow, row_line
from megatron_longpo.data.rows.folder import row_table, write_rows_dataset
from megatron_longpo.data.text.chat import conversation_row
from megatron_longpo.data.text.dpo_sets import DpoPair
from megatron_longpo.data.text.examples import Example, Turn
from megatron_longpo.data.text.prompt_layout import opening_messages, shorten_document
from megatron_longpo.data.text.renderings import TemplateChangesText
from megatron_longpo.data.text.sets import TextSet
from megatron_longpo.data.text.tokenizers import ChatTokenizer, Message, load_tokenizer
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


def example_row(
    example: Example, tokenizer: ChatTokenizer, config: TokenizeConfig
) -> tuple[PreferenceRow, bool]:
    """The row of one example and whether its document was cut; raises `Dropped` for no row."""
    if any(not turn.chosen.strip() or not turn.rejected.strip() for turn in example.turns):
        raise Dropped("empty answer")
    reference = {
        branch: _short_rows(example, branch, tokenizer, config.system)
        for branch in ("chosen", "rejected")
    }
    short_lengths = [len(row) for rows in reference.values() for row in rows]
    if max(short_lengths, default=0) > config.short_max_length:
        raise Dropped("short row over short_max_length")

    long_rows: dict[str, TokenRow] = {}

    def count_tokens(document: str) -> int:
        for branch in ("chosen", "rejected"):
            messages = _long_messages(example.turns, branch, document, config.system)
            long_rows[branch] = conversation_row(tokenizer, messages)
        return max(len(row) for row in long_rows.values())

    num_tokens = count_tokens(example.document)
    document_cut = num_tokens > config.max_length
    if document_cut:
        if config.too_long == "error":
            raise _too_long(example.source, num_tokens, config)
        if config.too_long == "drop":
            raise Dropped("long row over max_length")
        if any(
            turn.chunk is not None and _evidence(example, turn) is None for turn in example.turns
        ):
            raise Dropped("long row over max_length, its chunk not found in the document")
        document = shorten_document(
            example.document,
            count_tokens=count_tokens,
            max_tokens=config.max_length,
            keep=evidence_spans(example),
            cut_from=config.cut_from,
            token_starts=tokenizer.token_starts,
        )
        if document is None:
            raise Dropped("long row over max_length without cutting its chunks")
    row = PreferenceRow(
        id=example.id,
        source=example.source,
        chosen=long_rows["chosen"],
        rejected=long_rows["rejected"],
        reference_chosen=reference["chosen"],
        reference_rejected=reference["rejected"],
    )
    return row, document_cut


def dpo_row(pair: DpoPair, tokenizer: ChatTokenizer, config: TokenizeConfig) -> PreferenceRow:
    """The row of one pair of a DPO set, without short rows; raises `Dropped` for no row."""
    prompt: list[Message] = list(pair.prompt)
    if config.system is not None and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": config.system}, *prompt]
    rows: dict[str, TokenRow] = {}
    for branch, answers in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if any(m["role"] == "assistant" and not m["content"].strip() for m in answers):
            raise Dropped("empty answer")
        try:
            rows[branch] = conversation_row(
                tokenizer, [*prompt, *answers], answers_from=len(prompt)
            )
        except TemplateChangesText:
            raise
        except UserError as error:  # such as roles that the template does not know
            raise UserError(f"{pair.source}: {error}") from error
    num_tokens = max(len(row) for row in rows.values())
    if num_tokens > config.max_length:
        if config.too_long == "error":
            raise _too_long(pair.source, num_tokens, config)
        raise Dropped("long row over max_length")
    return PreferenceRow(
        id=pair.id,
        source=pair.source,
        chosen=rows["chosen"],
        rejected=rows["rejected"],
        reference_chosen=(),
        reference_rejected=(),
    )


def _too_long(source: str, num_tokens: int, config: TokenizeConfig) -> UserError:
    return UserError(
        f"{source}: gives a row of {num_tokens} tokens, more than max_length "
        f"({config.max_length}); raise it or set too_long to truncate_document or drop"
    )


def evidence_spans(example: Example) -> list[tuple[int, int]]:
    """Where the chunks stand in the document; a chunk without a span is looked for."""
    spans = (_evidence(example, turn) for turn in example.turns)
    return [span for span in spans if span is not None]


def _evidence(example: Example, turn: Turn) -> tuple[int, int] | None:
    if turn.chunk_span is not None or turn.chunk is None:
        return turn.chunk_span
    start = example.document.find(turn.chunk)
    return None if start < 0 else (start, start + len(turn.chunk))


def _answer(turn: Turn, branch: str) -> str:
    return turn.chosen if branch == "chosen" else turn.rejected


def _short_rows(
    example: Example, branch: str, tokenizer: ChatTokenizer, system: str | None
) -> tuple[TokenRow, ...]:
    """A row a turn of its chunk, question and answer; none where some turn has no chunk."""
    rows: list[TokenRow] = []
    for turn in example.turns:
        if turn.chunk is None:
            return ()
        messages = opening_messages(system, turn.chunk, turn.question)
        answer = {"role": "assistant", "content": _answer(turn, branch)}
        rows.append(conversation_row(tokenizer, [*messages, answer]))
    return tuple(rows)


def _long_messages(
    turns: tuple[Turn, ...], branch: str, document: str, system: str | None
) -> list[dict[str, str]]:
    messages = opening_messages(system, document, turns[0].question)
    for number, turn in enumerate(turns):
        if number > 0:
            messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": _answer(turn, branch)})
    return messages
