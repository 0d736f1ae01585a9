"""What `longpo inspect` shows of a row or an example: plain data for the console and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_longpo.data.rows.dataset import (
    IGNORED_LABEL,
    PreferenceRow,
    TokenRow,
    common_prefix_length,
)
from megatron_longpo.data.text.chat import prompt_ids
from megatron_longpo.data.text.dpo_sets import DpoPair
from megatron_longpo.data.text.examples import Example
from megatron_longpo.data.text.tokenize import evidence_spans
from megatron_longpo.data.text.tokenizers import ChatTokenizer, Message
from megatron_longpo.data.trees.forest import Forest
from megatron_longpo.data.trees.tree import TreeSettings, answer_turns, pair_trees
from megatron_longpo.errors import UserError

Mark = Literal["answer", "chunk"]
Branch = Literal["shared", "chosen", "rejected", "text"]

_SHORTEST_CHUNK = 8
"""Characters that a text must have to be looked for in a document as its chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A run of text of one kind."""

    text: str
    mark: Mark | None = None
    """answer = the tokens are labelled; chunk = a part of the document that a short row holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One node of a tree, or one text of an example."""

    name: str
    branch: Branch
    pieces: tuple[Piece, ...]
    start: int = 0
    """Position of its first token in its rows; 0 for texts."""
    num_tokens: int | None = None
    """None for texts."""
    num_answer_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One row or example."""

    id: str
    source: str
    num_turns: int
    segments: tuple[Segment, ...]
    facts: tuple[str, ...]
    """Lines about the trees and the pack that a row becomes."""


def sample_of_row(row: PreferenceRow, tokenizer: ChatTokenizer | None) -> Sample:
    """The row's trees; text where there is a tokenizer, ids else."""
    chunks = [] if tokenizer is None else _chunks_of_row(row, tokenizer)
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
    """The most answers of a long row, or its short rows where they are more."""
    turns = max(int(answer_turns(tokens).max()) + 1 for tokens in (row.chosen, row.rejected))
    return max(turns, len(row.reference_chosen))


def sample_of_text(item: Example | DpoPair) -> Sample:
    """The texts of an example that has not been tokenised."""
    if isinstance(item, DpoPair):
        parts: list[tuple[str, Branch, tuple[Message, ...]]] = [
            ("prompt", "shared", item.prompt),
            ("chosen", "chosen", item.chosen),
            ("rejected", "rejected", item.rejected),
        ]
        segments = [
            Segment(
                name=f"{name}, {message['role']}",
                branch=branch,
                pieces=(Piece(text=message["content"], mark=_answer_mark(name, message["role"])),),
            )
            for name, branch, messages in parts
            for message in messages
        ]
        turns = sum(message["role"] == "assistant" for message in item.chosen)
        return Sample(
            id=item.id, source=item.source, num_turns=turns, segments=tuple(segments), facts=()
        )
    document = _marked(item.document, evidence_spans(item))
    segments = [Segment(name="document", branch="shared", pieces=document)]
    for number, turn in enumerate(item.turns, start=1):
        segments += [
            Segment(
                name=f"turn {number}, question",
                branch="shared",
                pieces=(Piece(text=turn.question),),
            ),
            Segment(
                name=f"turn {number}, chosen",
                branch="chosen",
                pieces=(Piece(text=turn.chosen, mark="answer"),),
            ),
            Segment(
                name=f"turn {number}, rejected",
                branch="rejected",
                pieces=(Piece(text=turn.rejected, mark="answer"),),
            ),
        ]
    facts = [
        f"turn {number}: chunk [{start}, {end}) of {len(item.document)} characters"
        for number, (start, end) in enumerate(evidence_spans(item), start=1)
    ]
    return Sample(
        id=item.id,
        source=item.source,
        num_turns=len(item.turns),
        segments=tuple(segments),
        facts=tuple(facts),
    )


def _answer_mark(name: str, role: str) -> Mark | None:
    return "answer" if name != "prompt" and role == "assistant" else None


# ---------------------------------------------------------------- rows


def _tree(
    name: str,
    chosen: TokenRow,
    rejected: TokenRow,
    tokenizer: ChatTokenizer | None,
    chunks: Sequence[str],
) -> list[Segment]:
    """The shared prefix of two rows, and each one's rest."""
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
            pieces += _marked(text, [(at, at + length) for at, length in found if at >= 0])
    return pieces


def _marked(text: str, spans: Sequence[tuple[int, int]]) -> tuple[Piece, ...]:
    """The text with the spans marked as chunks; spans that overlap are one."""
    pieces: list[Piece] = []
    position = 0
    for start, end in sorted(spans):
        start = max(start, position)
        if end <= start:
            continue
        if start > position:
            pieces.append(Piece(text=text[position:start]))
        if pieces and pieces[-1].mark == "chunk" and start == position:
            pieces[-1] = Piece(text=pieces[-1].text + text[start:end], mark="chunk")
        else:
            pieces.append(Piece(text=text[start:end], mark="chunk"))
        position = end
    if position < len(text) or not pieces:
        pieces.append(Piece(text=text[position:]))
    return tuple(pieces)


def _chunks_of_row(row: PreferenceRow, tokenizer: ChatTokenizer) -> list[str]:
    """What each short prompt holds of the long row's document."""
    chunks: list[str] = []
    turns = answer_turns(row.chosen)
    for turn, short in enumerate(row.reference_chosen):
        long_prompt = tokenizer.decode(row.chosen.input_ids[: np.argmax(turns == turn)])
        prompt = tokenizer.decode(short.input_ids[: np.argmax(short.labels != IGNORED_LABEL)])
        chunk = _between_template_and_question(prompt, tokenizer)
        if len(chunk) < _SHORTEST_CHUNK or chunk not in long_prompt:
            chunk = _in_the_middle(prompt, long_prompt)
        if chunk:
            chunks.append(chunk)
    return chunks


def _between_template_and_question(prompt: str, tokenizer: ChatTokenizer) -> str:
    """The chunk of a prompt as `prompt_layout` makes it; empty where the template is another."""
    mark = "\u2022mark\u2022"
    user: Message = {"role": "user", "content": mark}
    system: Message = {"role": "system", "content": mark}
    opening, found, _ = tokenizer.decode(prompt_ids(tokenizer, [user])).partition(mark)
    if found and prompt.startswith(opening):
        begin = len(opening)
    else:
        try:
            parts = tokenizer.decode(prompt_ids(tokenizer, [system, user])).split(mark)
        except UserError:
            return ""
        border = parts[1] if len(parts) == 3 and prompt.startswith(parts[0]) else ""
        begin = prompt.find(border) + len(border) if border and border in prompt else len(prompt)
    return prompt[begin : max(begin, prompt.rfind("\n\n"))].strip()


def _in_the_middle(prompt: str, long_prompt: str) -> str:
    """What a short prompt holds between the beginning and the end that the long one has too.

    For rows of other makers, and empty where the chunk stands at an end of the document.
    """
    head = _common_length(prompt, long_prompt)
    tail = _common_length(prompt[::-1], long_prompt[::-1])
    core = prompt[head : max(head, len(prompt) - tail)]
    at = long_prompt.find(core)
    if len(core) < _SHORTEST_CHUNK or at < 0:
        return ""
    # Those ends may begin a little early: what goes on alike around it is the chunk's as well.
    left = _common_length(prompt[:head][::-1], long_prompt[:at][::-1])
    end = head + len(core)
    right = _common_length(prompt[end:], long_prompt[at + len(core) :])
    if left == head:  # the template's own beginning, at the beginning of the document
        left = 0
    return prompt[head - left : end + right].strip()


def _common_length(left: str, right: str) -> int:
    pairs = zip(left, right, strict=False)
    differing = (index for index, (one, other) in enumerate(pairs) if one != other)
    return next(differing, min(len(left), len(right)))


def _facts(row: PreferenceRow) -> list[str]:
    settings = TreeSettings() if row.reference_chosen else TreeSettings(reference=())
    trees = pair_trees(row, settings)
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
    """`[900 -> [12, 9]]`: tokens of each segment, children in brackets after their parent."""
    children: dict[int, list[int]] = {}
    for index, parent in enumerate(forest.segment_parents.tolist()):
        children.setdefault(parent, []).append(index)

    def shown(index: int) -> str:
        below = children.get(index)
        length = str(forest.segment_lengths[index])
        return length if below is None else f"{length} -> [{', '.join(map(shown, below))}]"

    return ", ".join(f"[{shown(root)}]" for root in children[-1])
