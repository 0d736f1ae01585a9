"""Makes samples of texts that are not tokenised yet."""

from __future__ import annotations

from megatron_longpo.data.inspect.samples import Branch, Mark, Piece, Sample, Segment, marked
from megatron_longpo.data.text.chat_tokenizer import Message
from megatron_longpo.data.text.dpo_sets import DpoPair
from megatron_longpo.data.text.examples import Example, evidence_spans


def sample_of_text(item: Example | DpoPair) -> Sample:
    """Returns the texts of an example or pair."""
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
    document = marked(item.document, evidence_spans(item))
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
