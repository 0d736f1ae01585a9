from __future__ import annotations

import os

import pytest

from megatron_longpo.runtime.gpu_memory import allow_expandable_segments

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.parametrize(("version", "name"), [("2.8.1", NAMES[1]), ("2.13.0+cpu", NAMES[0])])
def test_the_setting_goes_by_the_name_that_torch_reads(
    version: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in NAMES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setattr("importlib.metadata.version", lambda package: version)
    allow_expandable_segments()
    assert {n: os.environ[n] for n in NAMES if n in os.environ} == {
        name: "expandable_segments:True"
    }


@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_has_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in NAMES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:128")
    allow_expandable_segments()
    assert {n: os.environ[n] for n in NAMES if n in os.environ} == {name: "max_split_size_mb:128"}
