"""Spans of a tokenizer's tokens: they follow the text, and joined they are it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer, spans_by_words
from megatron_longpo.data.text.hf_tokenizer import HuggingFaceTokenizer
from megatron_longpo.data.text.sentencepiece_tokenizer import SentencePieceTokenizer
from tests import small_tokenizers as small

TEXTS = st.lists(
    st.sampled_from(["The tide ", "of 1843", " ", "\n\n", "é", "漢", "🙂", "[INST]", "</s>", "\t"]),
    max_size=20,
).map("".join)


@pytest.fixture(scope="module", params=["byte_level", "space_prefixing", "sentencepiece"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ChatTokenizer:
    if request.param == "sentencepiece":
        path = Path(tmp_path_factory.mktemp("model"), "tokenizer.model")
        path.write_bytes(small.sentencepiece_model(("[INST]",)))
        return SentencePieceTokenizer(path)
    made: dict[str, Callable[[], object]] = {
        "byte_level": lambda: small.byte_level(("<|im_end|>",), "<|im_end|>"),
        "space_prefixing": small.space_prefixing,
    }
    template = small.CHATML
    return HuggingFaceTokenizer(made[request.param](), name="t", chat_template=template)


@given(TEXTS)
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_token_has_its_characters(tokenizer: ChatTokenizer, text: str) -> None:
    spans = tokenizer.spans(text)
    assert spans.shape == (len(tokenizer.encode(text)), 2)
    starts, ends = np.maximum.accumulate(spans, axis=0).T
    assert (starts <= ends).all()
    covered = np.zeros(len(text), dtype=bool)
    for start, end in spans.tolist():
        assert 0 <= start <= end <= len(text)
        covered[start:end] = True
    left_out = [char for char, is_covered in zip(text, covered, strict=True) if not is_covered]
    assert set(left_out) <= {" "}
    assert len(left_out) <= text.count("[INST] ") + text.count("</s> ")
    # The tokens before a token that begins a character decode to the text before it, but for the
    # spaces that a model puts in front of words.
    for index in range(1, len(spans)):
        start = int(spans[index, 0])
        if spans[index - 1, 1] <= start < spans[index, 1]:
            before = tokenizer.decode(tokenizer.encode(text)[:index])
            assert "".join(before.split()) == "".join(text[:start].split())


def test_words_of_a_tokenizer_that_does_not_tell() -> None:
    spans = spans_by_words("abcd ef\n\n" + "x" * 50, lambda word: (len(word) + 1) // 2)
    starts, ends = spans.T
    assert starts[0] == 0 and ends[-1] == 59
    assert (starts[1:] == ends[:-1]).all()
    assert len(spans) == 2 + 2 + 1 + 1 + 20 + 5
