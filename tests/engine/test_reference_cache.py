"""The folder of cached log-probabilities: parts, headers, and what fits what."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_longpo.engine.reference_cache import HEADER_NAME, CacheHeader, find_logps, read_part
from megatron_longpo.engine.reference_fingerprint import PARTS, ReferenceFingerprint
from megatron_longpo.errors import UserError
from tests.reference.cache_parts import FINGERPRINT, LONG, SHORT, find, part, writer

FROM_0_1 = """
{
  "format": 1,
  "fingerprint": {
    "weights": {"model.safetensors": "3a7642894dca6bcca6cf12726301ed91"},
    "config": {
      "family": "llama", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48,
      "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "vocab_size": 300, "norm_eps": 1e-06,
      "tied_embeddings": false, "qkv_bias": false, "qk_norm": false,
      "rope.theta": 10000.0, "rope.scaling": null, "rope.max_position_embeddings": 4096
    },
    "tokenizer": {
      "chat_template.jinja": "56d01cddb3eb9bbece9af85a98d312ba",
      "tokenizer.json": "c059b037dd2e758dc62110c7759bba8d",
      "tokenizer_config.json": "a438a893868df805ce9f7de27ea59098"
    },
    "rows": {"fingerprint": "a4d5ab802113103dfed5e8a4d990a9b4", "number": 24},
    "settings": {"model.dtype": "fp32", "data.max_length": 4096, "data.too_long": "error"}
  },
  "rows": ["short_chosen", "short_rejected"],
  "made_with": {"versions": {"megatron_longpo": "0.1.0"}}
}
"""
"""A cache.json that version 0.1 wrote, into the folder e12534eb89c57aa2."""


def test_a_cache_of_version_0_1_is_found_and_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "e12534eb89c57aa2"
    folder.mkdir()
    (folder / HEADER_NAME).write_text(FROM_0_1)
    np.savez(
        folder / "part-000000.npz",
        indices=np.array([3, 5]),
        ids=np.array(["a", "b"]),
        num_turns=np.array([1, 2]),
        short_chosen=np.array([-1.5, -2.5, -3.5]),
        short_rejected=np.array([-4.5, -5.5, -6.5]),
    )
    fingerprint = ReferenceFingerprint(**json.loads(FROM_0_1)["fingerprint"])
    found = find_logps(tmp_path, fingerprint, SHORT, data_key="data.path")
    assert found.indices.tolist() == [3, 5] and found.ids.tolist() == ["a", "b"]
    assert found.sums["short_rejected"].tolist() == [-4.5, -5.5, -6.5]
    assert CacheHeader(fingerprint=fingerprint, rows=SHORT).folder_name == folder.name
    assert writer(tmp_path, fingerprint).saved == {3, 5}


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
