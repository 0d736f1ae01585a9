"""The config of `longpo report`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """What to plot."""

    runs: tuple[str, ...]
    """One or more logging.dir folders (or metrics.jsonl files)."""
    output: str | None = None
    """PNG to write; null = report.png in the first folder."""
