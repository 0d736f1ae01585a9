from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.generation.documents.documents import read


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "latin-1", "koi8-r"])
def test_encodings_are_found(encoding: str, tmp_path: Path) -> None:
    russian = "Прилив и отлив сменяют друг друга дважды в сутки, и вода уходит далеко. " * 9
    french = "À marée haute, l'eau recouvre l'île et les pêcheurs rentrent au port, déçus. " * 9
    # Where the first part is plain ASCII, the guess has to look further.
    text = "plain\n" * 20_000 + (russian if encoding == "koi8-r" else french)
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (document,), dropped = read(tmp_path)
    assert document.text == text and not dropped


def test_a_named_encoding_is_held_to(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xe9t\xe9")
    assert read(tmp_path, options={"encoding": "latin-1"})[0][0].text == "été"
    assert read(tmp_path, options={"encoding": "utf-8"})[1] == {"file not in utf-8": 1}


def test_bytes_of_no_encoding_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(random.Random(0).choices(range(1, 256), k=5000)))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfea")  # UTF-16 cut in half
    (tmp_path / "c.jsonl").write_text('{"text": "half \\ud83d a pair"}\n')
    documents, dropped = read(tmp_path)
    assert not documents
    assert sum(dropped.values()) == 3
    assert dropped["file not in utf-16, as its byte-order mark says"] == 1
    assert dropped["broken text (half of a surrogate pair)"] == 1
