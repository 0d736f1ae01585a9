from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_longpo.generation.chunking import Chunk, chunk_document


def words(text: str) -> int:
    return len(text.split())


def chunks(text: str, least: int, most: int) -> list[Chunk]:
    return chunk_document(text, count_tokens=words, min_tokens=least, max_tokens=most)


def test_blocks_are_packed_greedily() -> None:
    text = "a b c\n\nd e\n  \nf g h i\n\n\nj\n"
    assert [c.text for c in chunks(text, 1, 5)] == ["a b c\n\nd e", "f g h i\n\n\nj"]
    assert [c.text for c in chunks(text, 4, 4)] == ["f g h i"]
    assert chunks(text, 11, 20) == []


def test_indentation_of_a_first_line_stays() -> None:
    assert [c.text for c in chunks("a b\n\n    c = d\n", 1, 3)] == ["a b", "    c = d"]


def test_long_blocks_are_split_at_lines_then_sentences_then_words() -> None:
    assert [c.text for c in chunks("a b\nc d\ne f", 1, 4)] == ["a b\nc d", "e f"]
    assert [c.text for c in chunks("A b c. D e f. G h", 1, 4)] == ["A b c.", "D e f.", "G h"]
    assert [c.text for c in chunks("a b c d e", 1, 2)] == ["a b", "c d", "e"]
    split = chunk_document("x" * 10, count_tokens=len, min_tokens=1, max_tokens=4)
    assert "".join(c.text for c in split) == "x" * 10
    assert max(len(c.text) for c in split) <= 4


@given(
    st.text(alphabet="ab .\n\t", max_size=200),
    st.integers(min_value=1, max_value=6),
    st.integers(min_value=0, max_value=20),
)
def test_spans_and_bounds(text: str, least: int, more: int) -> None:
    found = chunk_document(text, count_tokens=len, min_tokens=least, max_tokens=least + more)
    position = 0
    for chunk in found:
        assert text[chunk.start : chunk.end] == chunk.text != ""
        assert position <= chunk.start
        assert len(chunk.text) <= least + more
        position = chunk.end
    if least == 1:  # nothing but white space is lost
        assert "".join("".join(c.text for c in found).split()) == "".join(text.split())
