"""Writes the page of `longpo inspect --html`: one file with its data, style and script."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.data.inspect.samples import Sample
from megatron_longpo.data.inspect.statistics import Series, Statistics
from megatron_longpo.data.jsonl import write_whole

TEMPLATE = "page.html"


def write_page(
    path: Path,
    samples: Sequence[Sample],
    statistics: Statistics,
    *,
    title: str,
    first: int,
    max_chars: int,
) -> None:
    """Writes the page (first beside it, then renamed).

    Args:
        path: path of the HTML file.
        samples: the samples to pick from.
        statistics: statistics of the whole set.
        title: name of the set.
        first: index of the sample that is shown when the page opens.
        max_chars: characters at each end of a long text that are shown before it is unfolded.
    """
    data = {
        "samples": [asdict(sample) for sample in samples],
        "statistics": {
            "read": f"{statistics.num_read} of {statistics.num_items} {statistics.kind}",
            "notes": statistics.notes,
            "series": [_plain(series) for series in statistics.series],
        },
        "first": first,
        "max_chars": max_chars,
    }
    template = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    before, after = template.split("{{ data }}")
    page = before.replace("{{ title }}", html.escape(title)) + _script_json(data) + after
    # JSON may hold half of a surrogate pair, which UTF-8 cannot.
    write_whole(path, page.encode("utf-8", errors="replace").decode("utf-8"))


def _script_json(data: Any) -> str:
    """Returns JSON that can neither end the script element around it nor begin a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(series: Series) -> dict[str, Any]:
    counts, borders = series.bins()
    values = series.values
    return {
        "name": series.name,
        "unit": series.unit,
        "least": float(min(values)),
        "median": float(np.median(values)),
        "most": float(max(values)),
        "counts": counts,
        "borders": borders,
    }
