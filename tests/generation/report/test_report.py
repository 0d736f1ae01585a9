"""The page beside the examples: complete, escaped, and without anything from elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_longpo.data.text.examples import Example, Turn
from megatron_longpo.generation.report.page import write_report
from megatron_longpo.generation.report.summary import GenerateSummary
from megatron_longpo.generation.shards.example_lengths import ExampleLengths

EVIL = "<script>alert('&amp;')</script>"


class Page(HTMLParser):
    """The text of a page, what is marked, and every tag and link."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.marked = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in ("meta", "br", "path", "use", "rect"):
            self.open.append(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")
        ]

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "use", "rect"):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "br", "path", "use", "rect"):
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "mark":
            self.marked += data


def example() -> Example:
    """A long document with evidence in its middle; every text holds markup."""
    before, chunk, after = "b" * 5000, f"The evidence. {EVIL} " + "c" * 4000, "a" * 5000
    document = f"{EVIL} begins {before}{chunk}{after} ends"
    start = document.index(chunk)
    turn = Turn(
        chunk=chunk,
        chunk_span=(start, start + len(chunk)),
        question=f"What? {EVIL}",
        chosen=f"Chosen. {EVIL}",
        rejected=f"Rejected. {EVIL}",
    )
    meta = {"source": f"a/{EVIL}.txt", "kinds": ["kind"], "rejected_candidates": [["Other."]]}
    return Example(id="x", document=document, turns=(turn, turn), meta=meta)


@pytest.fixture
def report(tmp_path: Path) -> Path:
    lengths = ExampleLengths(
        document=5000,
        chunk=[1000, 1000],
        question=[5, 5],
        chosen=[7, 9],
        rejected=[8, 20],
        position=[0.5, 0.5],
        kind=["kind", "kind"],
    )
    summary = GenerateSummary(
        num_documents=3,
        num_examples=1,
        num_turns=2,
        dropped=Counter({f"reason {EVIL}": 4, "other": 1}),
        kinds=Counter({"kind": 2}),
        tokens={"document": {"min": 5000, "median": 5000, "mean": 5000, "max": 5000}},
    )
    path = tmp_path / "report.html"
    write_report(
        path, title=f"{EVIL}.jsonl", summary=summary, lengths=[lengths], samples=[example()]
    )
    return path


def test_texts_are_escaped_and_nothing_is_loaded(report: Path) -> None:
    page = Page()
    page.feed(report.read_text(encoding="utf-8"))
    assert page.open == []
    assert page.tags["script"] == 0
    assert page.text.count(EVIL) >= 9
    assert all(link.startswith("#") for link in page.links)
    assert "1 examples with 2 turns from 3 documents" in page.text
    assert "reason" in page.text and "another answer from the document" in page.text
    for title in ("chunk asked about", "where the chunk stands", "rejected answer"):
        assert title in page.text


def test_a_long_document_shows_its_ends_and_its_chunks(report: Path) -> None:
    page = Page()
    page.feed(report.read_text(encoding="utf-8"))
    assert page.marked.startswith(f"The evidence. {EVIL} ccc")
    assert 2900 < len(page.marked) <= 3000  # the chunk's beginning and end
    gaps = [line for line in page.text.splitlines() if line.endswith("left out]")]
    assert len(gaps) == 3
    assert [" of the chunk " in gap for gap in gaps] == [False, True, False]
    left_out = sum(int(gap[1:].split()[0].replace(",", "")) for gap in gaps)
    document = example().document
    assert f"{len(document):,} characters" in page.text
    assert left_out == page_length_missing(document, page)


def page_length_missing(document: str, page: Page) -> int:
    """Characters of the document that the page does not show, counted letter by letter."""
    begin, end = page.text.index(f"{EVIL} begins"), page.text.index(" ends") + len(" ends")
    shown = page.text[begin:end]
    gaps = [line for line in shown.splitlines() if line.endswith("left out]")]
    return len(document) - (len(shown) - sum(len(gap) + 2 for gap in gaps))


def test_the_same_numbers_give_the_same_page(report: Path, tmp_path: Path) -> None:
    from megatron_longpo.generation.report.histograms import histograms_svg

    lengths = ExampleLengths(
        document=9, chunk=[1], question=[1], chosen=[1], rejected=[1], position=[0.1], kind=["k"]
    )
    assert histograms_svg([lengths]) == histograms_svg([lengths])


@pytest.mark.browser
def test_a_browser_shows_the_page(report: Path, tmp_path: Path) -> None:
    browser = os.environ.get("LONGPO_CHROMIUM") or shutil.which("chromium")
    assert browser, "needs chromium on PATH, or LONGPO_CHROMIUM"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,2400"]
    picture = tmp_path / "page.png"
    subprocess.run(
        [browser, *options, f"--screenshot={picture}", report.as_uri()],
        check=True,
        capture_output=True,
        timeout=60,
    )
    found = subprocess.run(
        [browser, *options, "--dump-dom", report.as_uri()],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert picture.stat().st_size > 20_000
    assert found.stdout.count("<mark>") == 2 and "<script" not in found.stdout
