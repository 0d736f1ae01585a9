"""The folder of cached log-probabilities: parts, headers, and what fits what."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_longpo.data.trees.forest import Row
from megatron_longpo.data.trees.reference_logps import ReferenceLogps
from megatron_longpo.engine.reference_cache import (
    HEADER_NAME,
    CacheHeader,
    CacheWriter,
    find_logps,
    part_paths,
    read_part,
)
from megatron_longpo.engine.reference_fingerprint import PARTS, ReferenceFingerprint
from megatron_longpo.errors import UserError

SHORT: tuple[Row, ...] = ("short_chosen", "short_rejected")
LONG: tuple[Row, ...] = ("long_chosen", "long_rejected")
FINGERPRINT = ReferenceFingerprint(
    weights={"model.safetensors": "a" * 32},
    config={"rope.theta": 10000.0, "rope.scaling": None},
    tokenizer={"tokenizer.json": "b" * 32},
    rows={"fingerprint": "c" * 32, "number": 3},
    settings={"data.max_length": 100},
)


def part(*indices: int, rows: tuple[Row, ...] = SHORT) -> ReferenceLogps:
    """One turn a row, and the row's index as its sum."""
    values = np.array(indices, dtype=np.float64)
    return ReferenceLogps(
        indices=np.array(indices, dtype=np.int64),
        ids=np.array([f"id {index} ü" for index in indices]),
        num_turns=np.ones(len(indices), dtype=np.int64),
        sums=dict.fromkeys(rows, -values / 3),
    )


def writer(
    folder: Path, fingerprint: ReferenceFingerprint = FINGERPRINT, rows: tuple[Row, ...] = SHORT
) -> CacheWriter:
    return CacheWriter(folder, CacheHeader(fingerprint=fingerprint, rows=rows), {"by": "test"})


def find(folder: Path, fingerprint: ReferenceFingerprint = FINGERPRINT, **how: Any) -> Any:
    return find_logps(folder, fingerprint, how.get("rows", SHORT), data_key="data.path")


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


def test_a_torn_part_is_an_error_to_training(tmp_path: Path) -> None:
    path = writer(tmp_path).write(part(0, 1))
    whole = path.read_bytes()
    for damaged in (b"", whole[:-30], whole[: len(whole) // 2], b"x" * len(whole)):
        path.write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"part-000000\.npz: damaged \(.*run `longpo reference`"
        ):
            find(tmp_path)
    flipped = bytearray(whole)
    flipped[whole.index(struct.pack("<d", -1 / 3))] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(UserError, match=r"part-000000\.npz: damaged"):
        find(tmp_path)


@pytest.mark.parametrize("wrong", ["nan", "short"])
def test_numbers_that_are_none_or_do_not_fit_are_damage(wrong: str, tmp_path: Path) -> None:
    good = part(0, 1)
    sums = np.array([np.nan, 1.0]) if wrong == "nan" else np.array([1.0])
    path = writer(tmp_path).write(replace(good, sums=dict.fromkeys(SHORT, sums)))
    with pytest.raises(UserError, match="its arrays do not fit together, or hold no numbers"):
        read_part(path, SHORT)


def test_an_empty_folder_and_one_that_is_not_there(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="holds no reference log-probabilities yet; make it"):
            find(folder)


@pytest.mark.parametrize("name", PARTS)
def test_each_part_of_the_fingerprint_is_named(name: str, tmp_path: Path) -> None:
    writer(tmp_path).write(part(0))
    values = {**getattr(FINGERPRINT, name)}
    key = next(iter(values))
    values[key] = 5.0
    changed = replace(FINGERPRINT, **{name: values})
    with pytest.raises(UserError) as caught:
        find(tmp_path, changed)
    shown = {
        "weights": "model.safetensors",
        "config": "rope.theta 10000.0, now 5.0",
        "tokenizer": "tokenizer.json",
        "rows": "data.path",
        "settings": "data.max_length 100, now 5.0",
    }[name]
    assert f"was computed with other {name} ({shown}); make it anew with `longpo reference`" in str(
        caught.value
    )
    # Both stay: each is found by its own fingerprint.
    writer(tmp_path, changed).write(part(1))
    assert find(tmp_path, changed).indices.tolist() == [1]
    assert find(tmp_path).indices.tolist() == [0]


def test_the_nearest_cache_is_compared(tmp_path: Path) -> None:
    """Evaluation rows lie beside the training rows; only what all of them lack is named."""
    writer(tmp_path).write(part(0))
    writer(tmp_path, replace(FINGERPRINT, rows={"fingerprint": "e", "number": 1})).write(part(0))
    changed = replace(FINGERPRINT, weights={"model.safetensors": "d"})
    with pytest.raises(UserError, match=r"with other weights \(model\.safetensors\); make"):
        find(tmp_path, changed)


def test_a_cache_of_more_rows_of_a_pair_serves_and_one_of_fewer_does_not(tmp_path: Path) -> None:
    writer(tmp_path).write(part(0))
    with pytest.raises(UserError, match="has no sums of long_chosen, long_rejected, which"):
        find(tmp_path, rows=LONG)
    with pytest.raises(UserError, match="has no sums of long_chosen, which"):
        find(tmp_path, rows=("short_chosen", "short_rejected", "long_chosen"))
    both = writer(tmp_path, rows=(*SHORT, *LONG))
    both.write(part(0, 1, rows=(*SHORT, *LONG)))
    assert find(tmp_path, rows=LONG).indices.tolist() == [0, 1]
    # Of two that serve, the one with more rows.
    assert find(tmp_path).indices.tolist() == [0, 1]


def test_another_format_is_not_read(tmp_path: Path) -> None:
    path = writer(tmp_path).folder / HEADER_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(UserError, match="holds no reference log-probabilities yet"):
        find(tmp_path)
