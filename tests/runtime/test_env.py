"""`longpo env` on this machine and on broken ones."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest

from megatron_longpo.cli import main
from megatron_longpo.runtime import env


def test_it_says_what_is_here_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    torch = importlib.import_module("torch")
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["cuda"]["available"] == torch.cuda.is_available()
    assert facts["optional"].keys() == env.OPTIONAL.keys()
    assert facts["missing"].keys() == {k for k, v in facts["optional"].items() if v is None}


def test_the_tables_name_every_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*env.REQUIRED, *env.OPTIONAL))


def test_a_torch_that_cannot_load_is_a_line_of_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.import_module

    def broken(name: str, package: str | None = None) -> Any:
        if name == "torch":
            raise OSError("libcudart.so:\n cannot open")
        return real(name, package)

    monkeypatch.setattr(env.importlib, "import_module", broken)
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cuda"] == {"error": "torch cannot be imported: libcudart.so: cannot open"}
    assert main(["env"]) == 0


def test_a_package_without_metadata_is_installed_all_the_same() -> None:
    assert env.package_version("json") == "installed"
    assert env.package_version("no_such_package_at_all") is None


def test_gpus_are_listed_with_memory_and_architecture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = env.environment()
    facts["cuda"]["gpus"] = ["H100, 80 GiB, sm_90"] * 2
    monkeypatch.setattr(env, "environment", lambda: facts)
    env.run_env()
    text = capsys.readouterr().out
    assert "0: H100, 80 GiB, sm_90" in text
    assert "1: H100, 80 GiB, sm_90" in text
