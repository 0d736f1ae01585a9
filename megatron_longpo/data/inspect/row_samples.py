"""Makes samples of tokenised rows: their trees, as text or ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_longpo.data.common_prefix import common_prefix_length
from megatron_longpo.data.inspect.chunks import chunks_of_row
from megatron_longpo.data.inspect.samples import Branch, Piece, Sample, Segment, marked
from megatron_longpo.data.rows.schema import IGNORED_LABEL, PreferenceRow, TokenRow
from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer
from megatron_longpo.data.trees.forest import Forest
from megatron_longpo.data.trees.tree import TreeConfig, answer_turns, pair_trees


def sample_of_row(row: PreferenceRow, tokenizer: ChatTokenizer | None) -> Sample:
    """Returns the row's trees: as text if there is a tokenizer, else as ids."""
    chunks = [] if tokenizer is None else chunks_of_row(row, tokenizer)
    segments = _tree("", row.chosen, row.rejected, tokenizer, chunks)
    for turn, rows in enumerate(
        zip(row.reference_chosen, row.reference_rejected, strict=True), start=1
    ):
        segments += _tree(f"reference, turn {turn}, ", *rows, tokenizer, ())
    return Sample(
        id=row.id,
        source=row.source,
        num_turns=num_turns(row),
        segments=tuple(segments),
        facts=tuple(_facts(row)),
    )


def num_turns(row: PreferenceRow) -> int:
    """Returns the most answers of a long row, or the number of short rows if that is greater."""
    turns = max(int(answer_turns(tokens).max()) + 1 for tokens in (row.chosen, row.rejected))
    return max(turns, len(row.reference_chosen))


def _tree(
    name: str,
    chosen: TokenRow,
    rejected: TokenRow,
    tokenizer: ChatTokenizer | None,
    chunks: Sequence[str],
) -> list[Segment]:
    """Returns the shared prefix of two rows and the rest of each."""
    shared = common_prefix_length(chosen.input_ids, rejected.input_ids)
    parts: list[tuple[str, Branch, TokenRow, int]] = [
        ("shared prefix", "shared", _part(chosen, 0, shared), 0),
        ("chosen", "chosen", _part(chosen, shared), shared),
        ("rejected", "rejected", _part(rejected, shared), shared),
    ]
    return [
        Segment(
            name=f"{name}{part}",
            branch=branch,
            pieces=tuple(_pieces(tokens, tokenizer, chunks)),
            start=start,
            num_tokens=len(tokens),
            num_answer_tokens=int((tokens.labels != IGNORED_LABEL).sum()),
        )
        for part, branch, tokens, start in parts
    ]


def _part(row: TokenRow, start: int, end: int | None = None) -> TokenRow:
    return TokenRow(input_ids=row.input_ids[start:end], labels=row.labels[start:end])


def _pieces(
    tokens: TokenRow, tokenizer: ChatTokenizer | None, chunks: Sequence[str]
) -> list[Piece]:
    pieces: list[Piece] = []
    is_answer = tokens.labels != IGNORED_LABEL
    borders = np.flatnonzero(np.diff(is_answer)) + 1
    for run in np.split(np.arange(len(tokens)), borders):
        if run.size == 0:
            continue
        ids = tokens.input_ids[run]
        text = " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
        if is_answer[run[0]]:
            pieces.append(Piece(text=text, mark="answer"))
        else:
            found = [(text.find(chunk), len(chunk)) for chunk in chunks]
            pieces += marked(text, [(at, at + length) for at, length in found if at >= 0])
    return pieces


def _facts(row: PreferenceRow) -> list[str]:
    config = TreeConfig() if row.reference_chosen else TreeConfig(reference=())
    trees = pair_trees(row, config)
    saved = trees.unshared_tokens - trees.policy.num_tokens
    facts = [
        f"tree of the policy: {_shape(trees.policy)}",
        f"in a pack: {trees.policy.num_tokens} tokens in place of {trees.unshared_tokens}, "
        f"{saved} ({saved / trees.unshared_tokens:.1%}) saved by sharing; "
        f"{trees.policy.num_scored} predictions scored",
    ]
    if trees.reference is not None:
        short = sum(map(len, (*row.reference_chosen, *row.reference_rejected)))
        facts.append(
            f"trees of the reference: {_shape(trees.reference)}; "
            f"{trees.reference.num_tokens} tokens in place of {short}"
        )
    return facts


def _shape(forest: Forest) -> str:
    """Returns `[900 -> [12, 9]]`: tokens of each segment, its children in brackets."""
    children: dict[int, list[int]] = {}
    for index, parent in enumerate(forest.segment_parents.tolist()):
        children.setdefault(parent, []).append(index)

    def shown(index: int) -> str:
        below = children.get(index)
        length = str(forest.segment_lengths[index])
        return length if below is None else f"{length} -> [{', '.join(map(shown, below))}]"

    return ", ".join(f"[{shown(root)}]" for root in children[-1])
