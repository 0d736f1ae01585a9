from __future__ import annotations

import re
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_longpo.config.names import DocumentKind
from megatron_longpo.generation.documents.chunking import Chunk, chunk_document
from megatron_longpo.generation.documents.kinds import KINDS
from megatron_longpo.generation.documents.token_spans import TokenSpans, find_token_spans
from tests import small_tokenizers as small


def word_spans(text: str) -> np.ndarray:
    spans = [found.span() for found in re.finditer(r"\S+", text)]
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def char_spans(text: str) -> np.ndarray:
    return np.stack([np.arange(len(text)), np.arange(len(text)) + 1], axis=1)


def chunks(text: str, least: int, most: int, kind: DocumentKind = "text") -> list[Chunk]:
    tokens = find_token_spans(text, word_spans)
    return chunk_document(text, tokens=tokens, kind=kind, min_tokens=least, max_tokens=most)


def texts(text: str, least: int, most: int, kind: DocumentKind = "text") -> list[str]:
    return [chunk.text for chunk in chunks(text, least, most, kind)]


def test_blocks_are_packed_greedily() -> None:
    text = "a b c\n\nd e\n  \nf g h i\n\n\nj\n"
    assert texts(text, 1, 5) == ["a b c\n\nd e", "f g h i\n\n\nj"]
    assert texts(text, 4, 4) == ["f g h i"]
    assert texts(text, 11, 20) == []


def test_token_spans_are_the_document_s() -> None:
    found = chunks("a b c\n\nd e\n\nf g", 1, 3)
    assert [(c.first_token, c.last_token) for c in found] == [(0, 3), (3, 5), (5, 7)]
    assert [c.num_tokens for c in found] == [3, 2, 2]


def test_indentation_of_a_first_line_stays() -> None:
    assert texts("a b\n\n    c = d\n", 1, 3) == ["a b", "    c = d"]
    assert texts("\n  \n   a b c", 1, 2) == ["   a b", "c"]


def test_long_blocks_are_split_at_lines_then_sentences_then_words() -> None:
    assert texts("a b\nc d\ne f", 1, 4) == ["a b\nc d", "e f"]
    assert texts("A b c. D e f. G h", 1, 4) == ["A b c.", "D e f.", "G h"]
    assert texts("a b c d e", 1, 2) == ["a b", "c d", "e"]
    tokens = find_token_spans("x" * 10, char_spans)
    split = chunk_document("x" * 10, tokens=tokens, min_tokens=1, max_tokens=4)
    assert [c.text for c in split] == ["xxxx", "xxxx", "xx"]


def test_a_section_is_a_better_border_than_a_paragraph() -> None:
    text = "# A\n\na b c\n\n## B\n\nd e\n\nf g\n\nh\n"
    # Nine words would go up to "f g"; the second half of the chunk has a heading.
    assert texts(text, 1, 9, "markdown")[0] == "# A\n\na b c"
    assert texts(text, 1, 9)[0] == "# A\n\na b c\n\n## B\n\nd e"


def test_a_heading_stays_with_what_follows() -> None:
    text = "one two three\n\n# Title\n\n## Part\n\nfour five six\n"
    assert texts(text, 1, 7, "markdown") == [
        "one two three",
        "# Title\n\n## Part\n\nfour five six",
    ]
    rst = "one two three\n\n.. _here:\n\nTitle\n=====\n\nfour five\n"
    assert texts(rst, 1, 6, "rst") == [
        "one two three",
        ".. _here:\n\nTitle\n=====\n\nfour five",
    ]
    latex = "one two three\n\n\\section{Title} \\label{a}\n\nfour five\n"
    assert texts(latex, 1, 5, "latex")[1].startswith("\\section{Title}")


FENCED = "a b c\n\n```\none\n\n# two\n\nthree\n```\n\ng h"
ENVIRONMENT = "a b c\n\n\\begin{x}\none\n\ntwo\n\nthree\n\\end{x}\n\ng h"
CLASS = "a = b\n\nclass A:\n    one\n\n    def two\n\n    three\n\ng = h"


@pytest.mark.parametrize(
    ("text", "kind", "block"),
    [
        (FENCED, "markdown", "```\none\n\n# two\n\nthree\n```"),
        (ENVIRONMENT, "latex", "\\begin{x}\none\n\ntwo\n\nthree\n\\end{x}"),
        (CLASS, "code", "class A:\n    one\n\n    def two\n\n    three"),
    ],
)
def test_blocks_stay_whole_where_they_fit(text: str, kind: DocumentKind, block: str) -> None:
    size = len(block.split())
    assert any(block in chunk for chunk in texts(text, 1, size + 1, kind))
    # As plain text the same limits tear it apart.
    assert not any(block in chunk for chunk in texts(text, 1, size + 1))
    split = texts(text, 1, size - 2, kind)
    assert "".join("".join(split).split()) == "".join(text.split())


def test_a_large_class_is_split_between_its_methods() -> None:
    text = "class A:\n    x\n\n    y\n\n    def f():\n    a\n\n    b\n\n    def g():\n        c"
    assert [part.split()[0] for part in texts(text, 1, 8, "code")] == ["class", "def"]


def test_decorators_and_comments_stay_with_their_function() -> None:
    text = "a b c\n\n# about f\n@d(\n    1\n)\ndef f():\n    pass\n\ndef g():\n    pass\n"
    assert texts(text, 1, 10, "code") == [
        "a b c",
        "# about f\n@d(\n    1\n)\ndef f():\n    pass",
        "def g():\n    pass",
    ]


LINES = [
    "# A",
    "## B",
    "Title\n=====",
    "```",
    "~~~",
    "",
    "\n",
    "  ",
    "    def g(self):",
    "# c",
    "}",
]
LINES += ["\\section{A}", "\\begin{x}", "\\end{x}", "\\begin{verbatim}", "\\end{verbatim}", "% c"]
LINES += ["def f():", "class A:", "@d", ".. _a:", ".. note::", "\r"]
INLINE = ["word ", "Ein Satz. ", "x", "é", "漢字。", "🙂", "    ", "\t", "\u2028"]
PIECES = st.sampled_from([*(f"{line}\n" for line in LINES), *INLINE])
TOKENIZER = small.byte_level(tuple(small.CHATML_SPECIAL), "<|im_end|>")


def model_spans(text: str) -> np.ndarray:
    encoding = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)
    return np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)


@given(
    st.lists(PIECES, max_size=60).map("".join),
    st.sampled_from(KINDS),
    st.integers(min_value=1, max_value=12),
    st.integers(min_value=0, max_value=40),
)
@example("🙂", "text", 1, 0)
@settings(max_examples=300, deadline=None)
def test_spans_and_bounds(text: str, kind: DocumentKind, least: int, more: int) -> None:
    most = least + more
    for spans_of in (char_spans, model_spans):
        tokens = find_token_spans(text, spans_of)
        found = chunk_document(text, tokens=tokens, kind=kind, min_tokens=least, max_tokens=most)
        again = chunk_document(text, tokens=tokens, kind=kind, min_tokens=least, max_tokens=most)
        assert found == again
        position = 0
        for chunk in found:
            assert text[chunk.start : chunk.end] == chunk.text
            assert chunk.text == chunk.text.rstrip() != ""
            assert position <= chunk.start
            assert least <= chunk.num_tokens <= most
            # The tokens of the chunk cover it, and those beside them lie outside.
            assert tokens.starts[chunk.first_token] <= chunk.start
            assert tokens.ends[chunk.last_token - 1] >= chunk.end
            assert (tokens.ends[: chunk.first_token] <= chunk.start).all()
            assert (tokens.starts[chunk.last_token :] >= chunk.end).all()
            position = chunk.end
        # Nothing but white space is lost, but for characters of more tokens than a chunk has.
        if least == 1 and (spans_of is char_spans or most >= 4):
            assert "".join("".join(c.text for c in found).split()) == "".join(text.split())


@given(st.lists(PIECES, max_size=60).map("".join), st.integers(min_value=8, max_value=40))
@settings(max_examples=100, deadline=None)
def test_a_chunk_by_itself_has_as_many_tokens_but_for_its_ends(text: str, most: int) -> None:
    tokens = find_token_spans(text, model_spans)
    for chunk in chunk_document(text, tokens=tokens, min_tokens=1, max_tokens=most):
        alone = len(TOKENIZER(chunk.text, add_special_tokens=False)["input_ids"])
        assert abs(alone - chunk.num_tokens) <= 4


def test_pieces_are_tokenised_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n\n".join(f"Section {n}.\n    The tide table lists {n}" for n in range(300))
    whole = find_token_spans(text, model_spans)
    monkeypatch.setattr("megatron_longpo.generation.documents.token_spans._PIECE", 1000)
    calls: list[int] = []

    def counted(piece: str) -> np.ndarray:
        calls.append(len(piece))
        return model_spans(piece)

    pieces = find_token_spans(text, counted)
    assert len(calls) > 5 and sum(calls) == len(text)
    assert pieces.starts.tolist() == whole.starts.tolist()
    assert pieces.ends.tolist() == whole.ends.tolist()
    calls.clear()
    assert len(find_token_spans(text, counted, at_most=100)) > 100
    assert len(calls) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("line", ["x", "a b. ", "```\n", "\\begin{x}\n", "Title\n=====\n\n", "\n"])
def test_time_grows_with_the_length_only(line: str, kind: DocumentKind) -> None:
    def seconds(length: int) -> float:
        text = line * (length // len(line))
        starts = np.arange(0, len(text), 4)
        tokens = TokenSpans(starts=starts, ends=np.append(starts[1:], len(text)))
        started = time.process_time()
        chunk_document(text, tokens=tokens, kind=kind, min_tokens=1, max_tokens=500)
        return time.process_time() - started

    seconds(10_000)
    small_time, large_time = (min(seconds(n) for _ in range(2)) for n in (20_000, 160_000))
    assert large_time < 24 * small_time + 0.1  # 8 times the length; quadratic would take 64
