from __future__ import annotations

from pathlib import Path

import pytest

from tests.generation.judge.judging import Judge, install, make_examples


@pytest.fixture
def examples(tmp_path: Path) -> str:
    return make_examples(tmp_path)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Judge:
    return install(monkeypatch)
