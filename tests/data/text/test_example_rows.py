"""Documents that `longpo tokenize` cuts: what must stay stays, whatever the texts and lengths."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longpo.config.tokenize import TokenizeConfig
from megatron_longpo.data.progress import Dropped
from megatron_longpo.data.rows.schema import IGNORED_LABEL, TokenRow
from megatron_longpo.data.text.example_rows import example_row
from megatron_longpo.data.text.examples import Example, Turn
from tests.public_templates import PUBLIC

NAMES = ("mistral-v0.2", "mistral-v0.3", "qwen2.5", "llama-3")
TOKENIZERS = {name: PUBLIC[name].tokenizer(name) for name in NAMES}
WORDS = ("ledger ", "[INST] ", "</s>", "<|im_start|>", "1843 ", "barrels\n\n", "日本", "éé ", "x")


def config(max_length: int, **changes: str) -> TokenizeConfig:
    return TokenizeConfig(
        examples="",
        output="",
        tokenizer="",
        max_length=max_length,
        **changes,  # type: ignore[arg-type]
    )


def answers(row: TokenRow) -> list[int]:
    return row.labels[row.labels != IGNORED_LABEL].tolist()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    words=st.lists(st.sampled_from(WORDS), min_size=20, max_size=120),
    chunk_starts=st.lists(st.integers(0, 100), min_size=1, max_size=3),
    num_cut=st.integers(1, 150),
    cut_from=st.sampled_from(["middle", "tail"]),
    has_spans=st.booleans(),
)
def test_only_the_document_is_cut(
    name: str,
    words: list[str],
    chunk_starts: list[int],
    num_cut: int,
    cut_from: Literal["middle", "tail"],
    has_spans: bool,
) -> None:
    tokenizer = TOKENIZERS[name]
    # Markers tell chunks apart from each other and from the words.
    pieces = [f"D{''.join(words[: len(words) // 2])}"]
    turns = []
    for number, start in enumerate(chunk_starts):
        chunk = f"Chunk {number} holds {''.join(words[start % len(words) :][:4]).strip()} end."
        before = sum(map(len, pieces))
        pieces += [chunk, f" after {number} {''.join(words[number::2])}E "]
        turns.append(
            Turn(
                chunk=chunk,
                chunk_span=(before, before + len(chunk)) if has_spans else None,
                question=f"Question {number}?",
                chosen=f"Chosen {number} [/INST] end",
                rejected=f"Rejected {number}",
            )
        )
    example = Example(id="x", document="".join(pieces), turns=tuple(turns), source="x")
    whole, cut = example_row(example, tokenizer, config(10**6))
    assert not cut
    longest = max(len(whole.chosen), len(whole.rejected))
    max_length = longest - min(num_cut, longest - 10)
    try:
        row, cut = example_row(example, tokenizer, config(max_length, cut_from=cut_from))
    except Dropped as dropped:
        assert str(dropped) == "long row over max_length without cutting its chunks"
        # So much must go that the document's own words are not enough.
        fixed = sum(len(tokenizer.encode(turn.chunk or "")) for turn in turns)
        assert longest - max_length > len(tokenizer.encode(example.document)) - 2 * fixed - 20
        return
    assert cut and max(len(row.chosen), len(row.rejected)) <= max_length
    for branch, before in ((row.chosen, whole.chosen), (row.rejected, whole.rejected)):
        assert answers(branch) == answers(before)
        text = tokenizer.decode(branch.input_ids)
        for turn in turns:
            assert turn.question in text and turn.chunk is not None
            assert turn.chunk in text
    for short, before in zip(row.reference_chosen, whole.reference_chosen, strict=True):
        assert np.array_equal(short.input_ids, before.input_ids)


def test_a_chunk_that_is_nowhere_cannot_be_kept() -> None:
    turn = Turn(chunk="Not there.", chunk_span=None, question="Q?", chosen="A.", rejected="B.")
    example = Example(id="x", document="Words. " * 200, turns=(turn,), source="x")
    row, _ = example_row(example, TOKENIZERS["qwen2.5"], config(10**6))
    with pytest.raises(Dropped, match="its chunk not found in the document"):
        example_row(example, TOKENIZERS["qwen2.5"], config(len(row.chosen) - 50))
