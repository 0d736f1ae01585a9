"""Collects documents that every machine has: sources of Python's own standard library.

    python tools/standard_library.py OUTPUT_FOLDER [--number 4] [--min-chars N --max-chars N]

The files are copied, to be read on this machine only; nothing of them is part of this project.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from pathlib import Path

AVOIDED = (
    "test",
    "tests",
    "distutils",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "encodings",
)
"""Folders whose files are generated, tables of data, or not the library's."""


def standard_library_files(min_chars: int, max_chars: int) -> list[Path]:
    """Modules of the wanted size, in an order that depends on their names only."""
    library = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if any(part in AVOIDED or part.startswith(("_", ".")) for part in parts):
            continue
        if min_chars <= path.stat().st_size <= max_chars:
            files.append(path)
    return files


def spread(files: list[Path], number: int) -> list[Path]:
    """`number` of the files at even distances, so that they are of different packages."""
    return [files[index * len(files) // number] for index in range(number)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--number", type=int, default=4)
    parser.add_argument("--min-chars", type=int, default=10000, help="about 2,400 tokens")
    parser.add_argument("--max-chars", type=int, default=13000, help="about 3,200 tokens")
    arguments = parser.parse_args()
    files = standard_library_files(arguments.min_chars, arguments.max_chars)
    if len(files) < arguments.number:
        sys.exit(f"only {len(files)} modules of that size here; widen --min-chars and --max-chars")
    arguments.output.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_path("stdlib"))
    for file in spread(files, arguments.number):
        name = ".".join(file.relative_to(library).with_suffix("").parts)
        text = file.read_text(encoding="utf-8")
        (arguments.output / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}: {len(text)} characters")


if __name__ == "__main__":
    main()
