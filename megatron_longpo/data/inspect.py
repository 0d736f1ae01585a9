"""`longpo inspect`: what a row holds, and what the rows of a dataset have in common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_longpo.data.config import InspectConfig
from megatron_longpo.data.rows import (
    IGNORED_LABEL,
    PreferenceRow,
    RowDataset,
    TokenRow,
    common_prefix_length,
    open_rows,
)
from megatron_longpo.data.tokenizers import ChatTokenizer, load_tokenizer
from megatron_longpo.data.tree import answer_turns
from megatron_longpo.errors import UserError

ANSWER_STYLE = "black on green"


def run_inspect(config: InspectConfig) -> None:
    """Prints one row, its answers highlighted, and statistics over the dataset."""
    dataset = open_rows(config.rows)
    if not 0 <= config.row < len(dataset):
        raise UserError(f"row ({config.row}): must be below the number of rows, {len(dataset)}")
    tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
    console = Console(soft_wrap=True, highlight=False)
    _show_row(console, dataset[config.row], tokenizer, config.max_chars)
    _show_statistics(console, dataset, config.sample)


def _show_row(
    console: Console, row: PreferenceRow, tokenizer: ChatTokenizer | None, max_chars: int
) -> None:
    console.print(Text(f"{row.source}  id {row.id}, {_num_turns(row)} turns", "bold"))
    shared = common_prefix_length(row.chosen.input_ids, row.rejected.input_ids)
    segments = [("shared prefix", _part(row.chosen, 0, shared))]
    segments += [("chosen", _part(row.chosen, shared)), ("rejected", _part(row.rejected, shared))]
    references = zip(row.reference_chosen, row.reference_rejected, strict=True)
    for turn, (chosen, rejected) in enumerate(references, start=1):
        shared = common_prefix_length(chosen.input_ids, rejected.input_ids)
        segments += [
            (f"reference, turn {turn}, shared prefix", _part(chosen, 0, shared)),
            (f"reference, turn {turn}, chosen", _part(chosen, shared)),
            (f"reference, turn {turn}, rejected", _part(rejected, shared)),
        ]
    for name, tokens in segments:
        num_answer = int((tokens.labels != IGNORED_LABEL).sum())
        console.print(Text(f"\n{name}: {len(tokens)} tokens, {num_answer} of answers", "bold cyan"))
        console.print(_highlighted(tokens, tokenizer, max_chars))
    if not row.reference_chosen:
        console.print(Text("\nno short reference rows", "bold cyan"))


def _num_turns(row: PreferenceRow) -> int:
    turns = max(int(answer_turns(tokens).max()) + 1 for tokens in (row.chosen, row.rejected))
    return max(turns, len(row.reference_chosen))


def _part(row: TokenRow, start: int, end: int | None = None) -> TokenRow:
    return TokenRow(input_ids=row.input_ids[start:end], labels=row.labels[start:end])


def _highlighted(tokens: TokenRow, tokenizer: ChatTokenizer | None, max_chars: int) -> Text:
    """The tokens as text (ids without a tokenizer), answers highlighted, long runs shortened."""
    text = Text()
    is_answer = tokens.labels != IGNORED_LABEL
    borders = np.flatnonzero(np.diff(is_answer)) + 1
    for run in np.split(np.arange(len(tokens)), borders):
        if run.size == 0:
            continue
        ids = tokens.input_ids[run]
        shown = " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids.tolist())
        if len(shown) > 2 * max_chars:
            left_out = len(shown) - 2 * max_chars
            shown = f"{shown[:max_chars]}\n[... {left_out} characters ...]\n{shown[-max_chars:]}"
        text.append(shown, ANSWER_STYLE if is_answer[run[0]] else None)
    return text


def _show_statistics(console: Console, dataset: RowDataset, sample: int) -> None:
    number = len(dataset) if sample == 0 else min(sample, len(dataset))
    indices = np.linspace(0, len(dataset) - 1, number).astype(int)
    chosen, rejected, shared, short, answers, turns = [], [], [], [], [], []
    num_without_short = 0
    for index in indices.tolist():
        row = dataset[index]
        chosen.append(len(row.chosen))
        rejected.append(len(row.rejected))
        shared.append(common_prefix_length(row.chosen.input_ids, row.rejected.input_ids))
        short += [len(tokens) for tokens in (*row.reference_chosen, *row.reference_rejected)]
        answers += [
            int((tokens.labels != IGNORED_LABEL).sum()) for tokens in (row.chosen, row.rejected)
        ]
        turns.append(_num_turns(row))
        num_without_short += not row.reference_chosen
    table = Table(title=f"{number} of {len(dataset)} rows", title_justify="left")
    for heading in ("tokens of", "least", "median", "most", "mean"):
        table.add_column(heading, justify="left" if heading == "tokens of" else "right")
    lengths: list[tuple[str, Sequence[int]]] = [
        ("chosen row", chosen),
        ("rejected row", rejected),
        ("their shared prefix", shared),
        ("answers of a long row", answers),
        ("short reference row", short),
    ]
    for name, values in lengths:
        if not values:
            continue
        table.add_row(
            name,
            str(min(values)),
            f"{np.median(values):.0f}",
            str(max(values)),
            f"{np.mean(values):.1f}",
        )
    console.print()
    console.print(table)
    saved = sum(shared) / (sum(chosen) + sum(rejected))
    console.print(
        f"turns a row: {min(turns)} to {max(turns)}; "
        f"sharing the prefix saves {saved:.1%} of the policy's tokens"
    )
    if num_without_short:
        console.print(
            f"{num_without_short} of {number} rows have no short reference rows (ref_chosen_*, "
            "ref_rejected_*): for objectives that read none, such as dpo and sft"
        )
