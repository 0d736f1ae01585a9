from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_longpo.data.text.examples import ExampleFile
from megatron_longpo.errors import UserError
from megatron_longpo.generation import generate
from tests.generation.scripted import Install, by_length, settings, whole_file


def test_merging_without_what_is_unfinished(
    many_documents: str, tmp_path: Path, scripted: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = whole_file(many_documents, tmp_path, scripted)
    config = settings("m", many_documents, tmp_path, merge=True)
    with pytest.raises(UserError, match=r"merge \(true\): there is no .*partial"):
        generate.run_generate(config)
    scripted(by_length)
    generate.run_generate(settings("m", many_documents, tmp_path, shard="1/2"))
    assert generate.run_generate(config).num_examples == 3
    assert "shard 0/2 has not ended" in capsys.readouterr().err
    second, third = (tmp_path / "examples.jsonl").read_bytes().splitlines()[1:]
    assert whole.splitlines()[1:].index(second) < whole.splitlines()[1:].index(third)
    generate.run_generate(settings("m", many_documents, tmp_path, shard="0/2"))
    assert (tmp_path / "examples.jsonl").read_bytes() == whole
    assert not (tmp_path / "examples.jsonl.partial").exists()


def test_the_final_file_reads_as_examples(
    many_documents: str, tmp_path: Path, scripted: Install
) -> None:
    scripted(by_length)
    generate.run_generate(settings("m", many_documents, tmp_path, report=True))
    assert "7 examples with 14 turns" in (tmp_path / "examples.report.html").read_text()
    examples = list(ExampleFile(tmp_path / "examples.jsonl"))
    sources = [Path(example.meta["source"]).name for example in examples]
    assert sources == [f"{number}.txt" for number in (0, 1, 3, 4, 6, 7, 8)]


def test_a_disk_too_full_to_merge_keeps_the_shards(
    many_documents: str, tmp_path: Path, scripted: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = whole_file(many_documents, tmp_path, scripted)
    config = settings("m", many_documents, tmp_path)
    scripted(by_length)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("replace", "fsync"):
        monkeypatch.setattr(os, name, full)
        with pytest.raises(UserError, match=r"No space left on device"):
            generate.run_generate(config)
        monkeypatch.undo()
        assert not (tmp_path / "examples.jsonl").exists()
        scripted(by_length)
    backend = scripted(by_length)
    assert generate.run_generate(config).num_resumed == 9
    assert backend.prompts == []
    assert (tmp_path / "examples.jsonl").read_bytes() == whole
