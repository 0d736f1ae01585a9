"""What kind of text a document is: prose, Markdown, reStructuredText, LaTeX or code."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import get_args

from megatron_longpo.config.names import DocumentKind

KINDS: tuple[DocumentKind, ...] = get_args(DocumentKind)

_SUFFIXES: dict[DocumentKind, str] = {
    "markdown": "md markdown mdown mkd mdx qmd rmd",
    "rst": "rst rest",
    "latex": "tex ltx latex",
    "code": "py pyi pyx js jsx mjs ts tsx c h cc cpp cxx hh hpp hxx cu cuh java go rs rb php sh "
    "bash zsh pl pm r jl scala kt kts swift cs lua hs ml mli clj ex exs erl el lisp vim sql f90 "
    "f95 dart zig nim m mm proto cmake tf v sv",
}
_KIND_OF_SUFFIX = {
    suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes.split()
}

_SNIFFED = 100_000
"""Characters that `find_kind` looks at if the name does not tell."""

_CODE_LINE = (
    r"^(?:(?:def|class|func|fn|function|impl|struct|interface)\b.*[:;{(]|#include\b.*|"
    r"import [\w.{*].*[\w;]|from [\w.]+ import .*|use [\w:]+.*;|package [\w.]+;?)$"
)


def find_kind(text: str, name: str = "") -> DocumentKind:
    """Returns the kind of a text, by the ending of its file's name, else by its beginning."""
    suffix = PurePath(name).suffix.lower().removeprefix(".")
    if suffix in _KIND_OF_SUFFIX:
        return _KIND_OF_SUFFIX[suffix]
    sample = text[:_SNIFFED]

    def number(pattern: str) -> int:
        return sum(1 for _ in re.finditer(pattern, sample, re.M))

    if number(r"^\s*\\documentclass|^\\(?:chapter|section|subsection)\*?\{|^\\begin\{") >= 2:
        return "latex"
    num_lines = sample.count("\n") + 1
    if sample.startswith("#!") or number(_CODE_LINE) > max(2, num_lines / 100):
        return "code"
    if number(r"^\.\. [\w-]+::|::$|:\w+:`") >= 2 and number(r"^\S.*\n([=~*^-])\1{3,}$") >= 1:
        return "rst"
    if number(r"^#{1,6} \S|^(?:```|~~~)|^[^\s].*\n={4,}$") >= 3:
        return "markdown"
    return "text"
