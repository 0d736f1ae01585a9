from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from megatron_longpo.config.generate import GenerateConfig
from megatron_longpo.errors import UserError
from megatron_longpo.generation.documents.reading import DocumentSet, open_documents
from tests.generation.documents.documents import prose, read


def test_near_duplicates_are_dropped_in_order(tmp_path: Path) -> None:
    first, other = prose(1), prose(2)
    words = first.split()
    close = " ".join([*words[:200], "changed", *words[201:]])  # 5 of 396 shingles differ
    far = " ".join([*words[:200], *other.split()[200:]])
    for name, text in (("a", first), ("b", close), ("c", far), ("d", other), ("e", "...")):
        (tmp_path / f"{name}.txt").write_text(text)
    documents = DocumentSet(str(tmp_path), near_duplicates=0.8)
    assert [Path(d.source).stem for d in documents] == ["a", "c", "d", "e"]
    assert documents.first_dropped["near-duplicate"] == (
        f"{tmp_path / 'b.txt'} (like {tmp_path / 'a.txt'})"
    )
    assert len(read(tmp_path, near_duplicates=None)[0]) == 5
    # At a tenth, halves count as alike.
    assert [Path(d.source).stem for d in read(tmp_path, near_duplicates=0.1)[0]] == ["a", "d", "e"]


def test_near_duplicates_in_scripts_without_spaces(tmp_path: Path) -> None:
    rng = random.Random(0)
    text = "".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(800))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(text[:400] + "変" + text[401:])
    (tmp_path / "c.txt").write_text(text[:200][::-1])
    assert read(tmp_path, near_duplicates=0.8)[1] == {"near-duplicate": 1}


def test_sketches_do_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_longpo.generation.documents import near_duplicates

    text = prose(3, 5000)
    whole = list(near_duplicates._shingles(text))
    monkeypatch.setattr(near_duplicates, "_BATCH", 100)
    assert list(near_duplicates._shingles(text)) == whole
    assert len(whole) == 4996


def test_near_duplicates_without_their_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setitem(sys.modules, "rensa", None)
    config = GenerateConfig(model="m", documents=str(tmp_path), output="o")
    with pytest.raises(UserError, match=r"near_duplicates \(0.8\): needs rensa .*near_duplicates:"):
        open_documents(config)
    config.near_duplicates = None
    assert len(list(open_documents(config))) == 1
