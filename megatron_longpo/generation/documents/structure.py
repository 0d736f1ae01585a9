"""Where the structure of a document allows it to be divided."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megatron_longpo.config.names import DocumentKind

PARAGRAPH = 20
"""Rank of a border between paragraphs; those of sections are smaller, the higher the section."""
INNER = 30
"""From this rank on, borders divide something that is kept whole if it fits: code blocks, LaTeX
environments, classes."""
_INNER_BLANK = 31


_ATX_HEADING = re.compile(r" {0,3}(#{1,6})(?:[ \t]|$)")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")
_SETEXT_LINE = re.compile(r" {0,3}(=+|-+)\s*$")
_RST_LINE = re.compile(r"([=\-~^\"'`#*+.:_])\1{2,}\s*$")
_RST_LABEL = re.compile(r"\.\. _[^:]+:\s*$")
_LATEX = re.compile(
    r"(?<!\\)%[^\n]*"
    r"|\\(?P<edge>begin|end)\s*\{(?P<name>[^}\n]*)\}"
    r"|\\(?P<section>part|chapter|section|subsection|subsubsection|paragraph)\*?\s*[\[{]"
)
_LATEX_RANKS = ("part", "chapter", "section", "subsection", "subsubsection", "paragraph")
_LATEX_VERBATIM = {"verbatim", "Verbatim", "lstlisting", "minted", "comment"}
_DECLARATION = re.compile(
    r"(?:(?:export|default|pub(?:\([^)]*\))?|public|private|protected|static|abstract|final|async|"
    r"unsafe|inline|declare|sealed|data|open|override)\s+)*"
    r"(?:def|class|func|fn|function|impl|struct|enum|union|interface|trait|namespace|module|mod|"
    r"type|template|sub|subroutine|procedure|protocol|extension|object|macro_rules!)\b(?!\s*[=:,.)])"
)
_ATTACHED = re.compile(r"@|#|//|/\*|\*|--|;;")
"""Decorators, attributes and comments, which belong to the declaration right below."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Borders:
    """Where a text may be divided, in order."""

    positions: np.ndarray
    """[num_borders], characters; a border at p divides `text[:p]` from `text[p:]`."""
    ranks: np.ndarray
    """[num_borders], the smaller the better."""


def find_borders(text: str, kind: DocumentKind) -> Borders:
    """Finds the borders of a text, in time linear in its length."""
    ranks: dict[int, int] = {}
    for position, rank in _FINDERS[kind](text):
        if 0 < position < len(text):
            ranks[position] = min(rank, ranks.get(position, rank))
    positions = sorted(ranks)
    return Borders(
        positions=np.array(positions, dtype=np.int64),
        ranks=np.array([ranks[position] for position in positions], dtype=np.int64),
    )


@dataclass(frozen=True, slots=True)
class _Line:
    start: int
    text: str
    after_blank: bool
    """Whether the line above is blank or there is none."""

    @property
    def is_indented(self) -> bool:
        return self.text[:1] in (" ", "\t")


def _lines(text: str) -> list[_Line]:
    """Returns the lines that are not blank, without their ends."""
    lines = []
    start, after_blank = 0, True
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        line = text[start:end].rstrip()
        if line:
            lines.append(_Line(start, line, after_blank))
        after_blank = not line
        start = end + 1
    return lines


def _text(text: str) -> Iterator[tuple[int, int]]:
    return ((line.start, PARAGRAPH) for line in _lines(text) if line.after_blank)


def _markdown(text: str) -> Iterator[tuple[int, int]]:
    fence = ""
    below_heading = False
    lines = _lines(text)
    for index, line in enumerate(lines):
        mark = _FENCE.match(line.text)
        if fence:
            if line.after_blank:
                yield line.start, _INNER_BLANK
            # The end of a block has at least as many marks as its beginning, and nothing after.
            if mark and mark[1].startswith(fence) and not mark[2].strip():
                fence = ""
            continue
        if mark:
            fence = mark[1]
        heading = _ATX_HEADING.match(line.text)
        level = len(heading[1]) if heading else 0
        if not heading and not mark and line.after_blank and index + 1 < len(lines):
            below = _SETEXT_LINE.match(lines[index + 1].text)
            if below and not lines[index + 1].after_blank and not line.is_indented:
                level = 1 if below[1][0] == "=" else 2
        if level and not below_heading:
            yield line.start, level
        elif line.after_blank and not level and not below_heading:
            yield line.start, _INNER_BLANK if line.is_indented else PARAGRAPH
        if level:
            below_heading = True
        elif not _SETEXT_LINE.match(line.text):
            below_heading = False


def _rst(text: str) -> Iterator[tuple[int, int]]:
    styles: dict[tuple[str, bool], int] = {}
    lines = _lines(text)
    # Which line begins a title, and how many lines the title has.
    titles: dict[int, tuple[int, int]] = {}
    index = 0
    while index < len(lines):
        title = _rst_title(lines, index)
        if title is None:
            index += 1
            continue
        style, num_lines = title
        titles[index] = styles.setdefault(style, len(styles)), num_lines
        index += num_lines
    kept_start: int | None = None  # of a title or a label, which what follows belongs to
    title_lines = 0
    for index, line in enumerate(lines):
        if index in titles:
            rank, title_lines = titles[index]
            above_is_label = kept_start is not None and _RST_LABEL.match(lines[index - 1].text)
            if kept_start is None or above_is_label:
                yield line.start if kept_start is None else kept_start, min(rank, PARAGRAPH - 1)
            kept_start = line.start
        elif title_lines == 0:
            is_label = _RST_LABEL.match(line.text) is not None
            if line.after_blank and kept_start is None:
                yield line.start, _INNER_BLANK if line.is_indented else PARAGRAPH
            kept_start = (line.start if kept_start is None else kept_start) if is_label else None
        title_lines = max(0, title_lines - 1)


def _rst_title(lines: list[_Line], index: int) -> tuple[tuple[str, bool], int] | None:
    """Returns (style, number of lines) of a title that begins at a line."""
    first = lines[index]
    over = _RST_LINE.match(first.text)
    below = lines[index + 1 : index + 3]
    if not first.after_blank and not over:
        return None
    if over and len(below) == 2 and below[1].text == first.text and not below[1].after_blank:
        return (over[1], True), 3
    if over or not below or first.is_indented or below[0].after_blank:
        return None
    under = _RST_LINE.match(below[0].text)
    if under and len(below[0].text) >= len(first.text):
        return (under[1], False), 2
    return None


def _latex(text: str) -> Iterator[tuple[int, int]]:
    sections: list[tuple[int, int]] = []
    whole: list[tuple[int, int]] = []
    open_at: list[tuple[str, int, int]] = []
    names: Counter[str] = Counter()
    position = 0
    while found := _LATEX.search(text, position):
        position = found.end()
        if found["section"]:
            sections.append((found.start(), _LATEX_RANKS.index(found["section"])))
        elif found["edge"] == "begin" and found["name"] in _LATEX_VERBATIM:
            end = text.find(f"\\end{{{found['name']}}}", position)
            position = len(text) if end < 0 else end
            whole.append((found.start(), position))
        elif found["edge"] == "begin" and found["name"] != "document":
            open_at.append((found["name"], found.start(), len(sections)))
            names[found["name"]] += 1
        elif found["edge"] == "end" and names[found["name"]]:
            name = ""
            while name != found["name"]:
                name, start, num_sections = open_at.pop()
                names[name] -= 1
            # What holds sections is a part of the document rather than a block.
            if num_sections == len(sections):
                whole.append((start, position))
    title_on_line: dict[int, tuple[int, int]] = {}
    for start, rank in sections:
        line_start = text.rfind("\n", 0, start) + 1
        is_first = not text[line_start:start].strip()
        title_on_line.setdefault(line_start, (line_start if is_first else start, rank))
    inside = _Regions(whole)
    below_title = False
    for line in _lines(text):
        title = title_on_line.get(line.start)
        if title and not below_title:
            yield title
        elif line.after_blank and not title and not below_title:
            yield line.start, _INNER_BLANK if inside.hold(line.start) else PARAGRAPH
        below_title = title is not None


class _Regions:
    """Spans of a text, joined where they overlap."""

    def __init__(self, spans: list[tuple[int, int]]) -> None:
        starts: list[int] = []
        ends: list[int] = []
        for start, end in sorted(spans):
            if ends and start < ends[-1]:
                ends[-1] = max(ends[-1], end)
            else:
                starts.append(start)
                ends.append(end)
        self._starts, self._ends = np.array(starts), np.array(ends)

    def hold(self, position: int) -> bool:
        """Returns whether a border here would divide a span."""
        at = int(np.searchsorted(self._starts, position, side="left")) - 1
        return at >= 0 and position < int(self._ends[at])


def _code(text: str) -> Iterator[tuple[int, int]]:
    attached: int | None = None
    attached_after_blank = False
    for line in _lines(text):
        if line.after_blank:
            attached = None
        content = line.text.lstrip()
        is_declaration = _DECLARATION.match(content) is not None
        if is_declaration:
            start = line.start if attached is None else attached
            after_blank = line.after_blank or (attached is not None and attached_after_blank)
            if not line.is_indented:
                yield start, 0
            elif after_blank:
                yield start, INNER
            attached = None
        elif _ATTACHED.match(content):
            if attached is None:
                attached, attached_after_blank = line.start, line.after_blank
                if line.after_blank:
                    yield line.start, _INNER_BLANK if line.is_indented else PARAGRAPH
        elif line.after_blank:
            closes = content[0] in ")}]"
            yield line.start, _INNER_BLANK if line.is_indented or closes else PARAGRAPH
        elif not line.is_indented and content[0] not in ")]":
            attached = None


_FINDERS: dict[DocumentKind, Callable[[str], Iterator[tuple[int, int]]]] = {
    "text": _text,
    "markdown": _markdown,
    "rst": _rst,
    "latex": _latex,
    "code": _code,
}
