from __future__ import annotations

from pathlib import Path

import pytest

from megatron_longpo.errors import UserError
from megatron_longpo.generation import generate
from megatron_longpo.generation.backends.base import BackendError
from megatron_longpo.generation.shards import failures
from tests.generation.scripted import Install, by_length, settings, whole_file


def test_documents_that_a_backend_fails_on_are_tried_again(
    many_documents: str, tmp_path: Path, scripted: Install
) -> None:
    whole = whole_file(many_documents, tmp_path, scripted)

    def failing(prompt: str) -> str | BackendError:
        return BackendError("HTTP 500") if "Thing4x" in prompt else by_length(prompt)

    scripted(failing, documents_at_once=2)
    config = settings("m", many_documents, tmp_path)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"1 documents were put aside \(1 x HTTP 500\); the same command tries"
        ):
            generate.run_generate(config)
        assert not (tmp_path / "examples.jsonl").exists()
    backend = scripted(by_length)
    summary = generate.run_generate(config)
    assert (summary.num_resumed, len(backend.prompts)) == (8, 4)
    assert not summary.put_aside
    assert (tmp_path / "examples.jsonl").read_bytes() == whole


def test_a_lost_server_keeps_what_is_finished(
    many_documents: str, tmp_path: Path, scripted: Install
) -> None:
    def lost(prompt: str) -> str:
        if "Thing4x" in prompt:
            raise UserError("server.endpoints (http://a): cannot be reached")
        return by_length(prompt)

    scripted(lost, documents_at_once=2)
    config = settings("m", many_documents, tmp_path)
    with pytest.raises(UserError, match=r"cannot be reached"):
        generate.run_generate(config)
    scripted(by_length)
    assert generate.run_generate(config).num_resumed >= 3


def test_a_backend_that_fails_on_everything_is_given_up(
    many_documents: str, tmp_path: Path, scripted: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "MOST_IN_A_ROW", 3)
    backend = scripted(lambda _: BackendError("HTTP 401"))
    with pytest.raises(UserError, match=r"3 documents in a row failed, .* with: HTTP 401"):
        generate.run_generate(settings("m", many_documents, tmp_path))
    assert len(backend.batches) == 3
