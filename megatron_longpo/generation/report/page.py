"""The HTML report beside an examples file: numbers, histograms, and examples to read.

It is one file: no script, nothing from the network, every text escaped.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from megatron_longpo.data.jsonl import write_whole
from megatron_longpo.data.text.examples import Example, Turn
from megatron_longpo.generation.report.histograms import histograms_svg
from megatron_longpo.generation.report.summary import GenerateSummary
from megatron_longpo.generation.shards.example_lengths import ExampleLengths

SHOWN_AT_ENDS = 800
"""Characters of a document's beginning and end."""
SHOWN_AROUND = 300
"""Characters before and after a chunk."""
SHOWN_OF_CHUNK = 1500
"""Characters of a chunk's beginning and end."""
LEAST_LEFT_OUT = 200
"""Shorter gaps are shown."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #fff;
       max-width: 1080px; margin: 2em auto; padding: 0 1.2em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; }
h3 { font-size: 1em; margin: 1.6em 0 .4em; }
table { border-collapse: collapse; }
td, th { padding: .2em .8em .2em 0; text-align: left; vertical-align: top; font-weight: normal; }
th { color: #5b6775; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
.bar { background: #3b6ea5; height: .8em; display: inline-block; }
svg { max-width: 100%; height: auto; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace;
        border: 1px solid #d5dbe2; border-radius: 4px; padding: .7em; }
.document { max-height: 34em; overflow-y: auto; }
mark { background: #fff1a8; } .gap { color: #8a5a00; font-style: italic; }
.answers { display: grid; grid-template-columns: 1fr 1fr; gap: 1em; }
.chosen { border-left: 4px solid #3a8f4d; } .rejected { border-left: 4px solid #b3473e; }
.small { color: #5b6775; font-size: .9em; }
"""


def write_report(
    path: Path,
    *,
    title: str,
    summary: GenerateSummary,
    lengths: Sequence[ExampleLengths],
    samples: Sequence[Example],
) -> None:
    """Writes the report, as a whole or not at all.

    Args:
        path: of the page.
        title: what it is about.
        summary: the numbers.
        lengths: of all examples.
        samples: examples to show.
    """
    parts = [
        f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>{escape(title)}"
        f"</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>",
        *_numbers(summary),
        *_counts("Turns by kind of question", summary.kinds),
        *_counts("Dropped, by reason", summary.dropped),
        *_counts("Documents put aside, by reason", summary.put_aside),
        f"<h2>Lengths</h2>{histograms_svg(lengths)}",
        f"<h2>{len(samples)} examples</h2>",
    ]
    for sample in samples:
        parts += _example(sample)
    write_whole(path, "\n".join([*parts, "</body></html>\n"]))


# ---------------------------------------------------------------- numbers


def _numbers(summary: GenerateSummary) -> Iterator[str]:
    yield (
        f"<p>{summary.num_examples:,} examples with {summary.num_turns:,} turns from "
        f"{summary.num_documents:,} documents, in {summary.seconds:,.0f} s of writing.</p>"
    )
    yield "<h2>Tokens</h2><table><tr><th></th>"
    yield "".join(f"<th>{name}</th>" for name in ("least", "median", "mean", "most"))
    yield "</tr>"
    for name, spread in summary.tokens.items():
        cells = "".join(f"<td class='number'>{value:,.0f}</td>" for value in spread.values())
        yield f"<tr><th>{escape(name)}</th>{cells}</tr>"
    yield "</table>"


def _counts(title: str, counts: Counter[str]) -> Iterator[str]:
    if not counts:
        return
    yield f"<h2>{escape(title)}</h2><table>"
    most = max(counts.values())
    for reason, number in counts.most_common():
        width = max(2, round(300 * number / most))
        yield (
            f"<tr><th>{escape(reason)}</th><td class='number'>{number:,}</td>"
            f"<td><span class='bar' style='width:{width}px'></span></td></tr>"
        )
    yield "</table>"


# ---------------------------------------------------------------- examples


def _example(example: Example) -> Iterator[str]:
    source = example.meta.get("source", "")
    yield (
        f"<h3>{escape(example.id)}</h3><p class='small'>{escape(str(source))}, "
        f"{len(example.document):,} characters; the chunks asked about are marked</p>"
    )
    yield f"<div class='text document'>{_document(example)}</div>"
    kinds = example.meta.get("kinds", [])
    candidates = example.meta.get("rejected_candidates", [])
    for index, turn in enumerate(example.turns):
        kind = f" ({escape(str(kinds[index]))})" if index < len(kinds) else ""
        yield f"<h3>Turn {index + 1}{kind}</h3><div class='text'>{escape(turn.question)}</div>"
        yield "<div class='answers'>"
        yield _answer("chosen", "chosen, from the chunk", turn.chosen)
        yield _answer("rejected", "rejected, from the document", turn.rejected)
        yield "</div>"
        for other in candidates[index] if index < len(candidates) else []:
            yield _answer("rejected", "another answer from the document", str(other))


def _answer(branch: str, title: str, text: str) -> str:
    return f"<div><p class='small'>{title}</p><div class='text {branch}'>{escape(text)}</div></div>"


def _document(example: Example) -> str:
    """Marks the chunks in a document; leaves out what is far from them and from both ends."""
    text, spans = example.document, _spans(example.turns)
    shown = _shown(len(text), spans)
    borders = sorted({border for span in [*shown, *spans] for border in span})
    parts = []
    position = 0
    for start, end in itertools.pairwise(borders):
        if not any(left <= start and end <= right for left, right in shown):
            continue
        if start > position:
            parts.append(_gap(start - position, any(a <= position < b for a, b in spans)))
        piece = escape(text[start:end])
        in_chunk = any(left <= start and end <= right for left, right in spans)
        parts.append(f"<mark>{piece}</mark>" if in_chunk else piece)
        position = end
    return "".join(parts)


def _gap(num_chars: int, in_chunk: bool) -> str:
    whose = "of the chunk " if in_chunk else ""
    return f"\n<span class='gap'>[{num_chars:,} characters {whose}left out]</span>\n"


def _spans(turns: Sequence[Turn]) -> list[tuple[int, int]]:
    return [turn.chunk_span for turn in turns if turn.chunk_span is not None]


def _shown(length: int, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns [start, end) of what is shown, in order, with gaps of at least `LEAST_LEFT_OUT`."""
    wanted = [(0, SHOWN_AT_ENDS), (length - SHOWN_AT_ENDS, length)]
    for start, end in spans:
        wanted.append((start - SHOWN_AROUND, min(start + SHOWN_OF_CHUNK, end)))
        wanted.append((max(start, end - SHOWN_OF_CHUNK), end + SHOWN_AROUND))
    shown: list[tuple[int, int]] = []
    for start, end in sorted((max(0, start), min(length, end)) for start, end in wanted):
        if shown and start - shown[-1][1] < LEAST_LEFT_OUT:
            shown[-1] = (shown[-1][0], max(shown[-1][1], end))
        else:
            shown.append((start, end))
    return shown
