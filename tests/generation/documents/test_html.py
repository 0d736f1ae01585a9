from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_longpo.errors import UserError
from megatron_longpo.generation.documents import html
from megatron_longpo.generation.documents.kinds import find_kind
from megatron_longpo.generation.documents.reading import DocumentSet
from tests.generation.documents.documents import prose, read

PAGE = (
    "<?xml version='1.0'?>\n<!DOCTYPE html><html><head><title>t</title></head><body><h2>Tides</h2>"
    "<p>High <a href='x'>water</a>.</p><pre>a  b\n</pre><script>no()</script></body></html>"
)


def test_html_is_dropped_extracted_or_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PAGE)
    (tmp_path / "b.txt").write_text("<div><p>no head</p>" + "<p>a fragment</p>\n" * 200 + "</div>")
    (tmp_path / "c.md").write_text(f"Markdown with a <b>few</b> tags. {prose(1, 60)}\n" * 100)
    assert read(tmp_path)[1] == {"HTML page": 2}
    page, fragment, markdown = read(tmp_path, html="extract")[0]
    assert page.text == "## Tides\n\nHigh water.\n\n```\na  b\n```\n"
    assert find_kind(page.text, page.name) == "markdown"
    assert "a fragment" in fragment.text and "<p>" not in fragment.text
    assert markdown.text.startswith("Markdown with a <b>")
    assert read(tmp_path, html="keep")[0][0].text == PAGE


def test_extraction_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setitem(sys.modules, "markdownify", None)
    with pytest.raises(UserError, match=r"html \(extract\): needs markdownify; pip install"):
        DocumentSet(str(tmp_path), html="extract")
    with pytest.raises(UserError):
        html.html_to_markdown(PAGE)
