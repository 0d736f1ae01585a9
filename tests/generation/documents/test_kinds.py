from __future__ import annotations

import pytest

from megatron_longpo.generation.documents.kinds import find_kind

TEXTS = {
    "markdown": "# Title\n\nText.\n\n## Part\n\n```\ncode\n```\n\n# More\n",
    "rst": "Title\n=====\n\n.. note::\n\n   See :ref:`a`.\n\nPart\n----\n\nText::\n\n   code\n",
    "latex": "\\documentclass{article}\n\\begin{document}\n\\section{A}\nText.\n\\end{document}\n",
    "code": "import os\nfrom a.b import c\n\n\nclass A:\n    pass\n\n\ndef f(x):\n    return x\n",
    "text": "A letter of 1843.\n\nFrom the harbour, with regards. import and class are words.\n",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_kind_by_content(kind: str) -> None:
    assert find_kind(TEXTS[kind]) == kind
    assert find_kind(TEXTS[kind] * 20, "letter.txt") == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.MD", "markdown"),
        ("a.rst", "rst"),
        ("a.tex", "latex"),
        ("a.py", "code"),
        ("a.go", "code"),
    ],
)
def test_kind_by_name(name: str, kind: str) -> None:
    assert find_kind("Anything.", name) == kind
