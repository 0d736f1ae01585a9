from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_longpo.errors import UserError
from megatron_longpo.generation import generate
from tests.generation.scripted import Install, by_length, settings, whole_file


def test_resuming_with_something_else_is_refused(
    model: str, many_documents: str, tmp_path: Path, scripted: Install
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    scripted(by_length)
    config = settings(str(copy), many_documents, tmp_path, shard="0/2")
    generate.run_generate(config)
    for key, value, message in (
        ("seed", 43, r"was made with other settings: seed was 42, now 43; give --overw"),
        ("shard", "0/3", r"was begun with 2 shards, now 3; give --shard i/2"),
    ):
        before = getattr(config, key)
        setattr(config, key, value)
        with pytest.raises(UserError, match=message):
            generate.run_generate(config)
        setattr(config, key, before)
    config.instructions = str(tmp_path / "questions.txt")
    Path(config.instructions).write_text("What?\n")
    with pytest.raises(UserError, match=r"instructions was template, now .*questions.txt \w{12};"):
        generate.run_generate(config)
    config.instructions = "template"
    config.num_threads = 2
    assert generate.run_generate(config).num_resumed == 5
    first = Path(many_documents, "0.txt")
    text = first.read_text()
    first.write_text(text + "More.")
    with pytest.raises(UserError, match=r"0.txt is number 0 now, and was another when"):
        generate.run_generate(config)
    first.write_text(text)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"was begun with another model in model \("):
        generate.run_generate(config)
    config.shard, config.overwrite = None, True
    assert generate.run_generate(config).num_resumed == 0


def test_documents_may_be_added_at_the_end(
    many_documents: str, tmp_path: Path, scripted: Install
) -> None:
    whole = whole_file(many_documents, tmp_path, scripted)
    scripted(by_length)
    for shard, limit, is_last in (("0/2", 4, False), ("1/2", None, False), ("0/2", None, True)):
        generate.run_generate(settings("m", many_documents, tmp_path, shard=shard, limit=limit))
        assert (tmp_path / "examples.jsonl").exists() == is_last
    assert (tmp_path / "examples.jsonl").read_bytes() == whole
