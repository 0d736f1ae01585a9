"""Parts of a cache are written whole, found again, and made anew when damaged."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_longpo.engine.reference_cache import HEADER_NAME, part_paths
from tests.reference.cache_parts import find, part, writer


def test_what_is_written_is_found(tmp_path: Path) -> None:
    cache = writer(tmp_path)
    assert cache.saved == set()
    cache.write(part(4, 7))
    cache.write(part(0))
    found = find(tmp_path)
    assert found.indices.tolist() == [0, 4, 7]
    assert found.ids.tolist() == ["id 0 ü", "id 4 ü", "id 7 ü"]
    # Not a bit is lost.
    assert found.sums["short_chosen"].tolist() == [-0.0, -4 / 3, -7 / 3]
    assert found.source == str(cache.folder)
    assert not list(tmp_path.rglob("*.partial"))
    header = json.loads((cache.folder / HEADER_NAME).read_text())
    assert header["format"] == 1
    assert header["made_with"]["by"] == "test" and "torch" in header["made_with"]["versions"]


def test_a_writer_goes_on_and_makes_torn_parts_anew(tmp_path: Path) -> None:
    cache = writer(tmp_path)
    paths = [cache.write(part(index)) for index in range(4)]
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    paths[2].write_bytes(b"")
    (cache.folder / "part-000009.npz.partial").write_bytes(b"half")
    (cache.folder / HEADER_NAME).write_text("{torn")
    again = writer(tmp_path)
    assert again.saved == {0, 3}
    assert again.damaged == [paths[1], paths[2]]
    again.write(part(1, 2))
    assert find(tmp_path).indices.tolist() == [0, 1, 2, 3]
    assert len(part_paths(cache.folder)) == 3
