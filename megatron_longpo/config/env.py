"""The config of `longpo env`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvConfig:
    """What `longpo env` prints."""

    json: bool = False
    """Print JSON instead of tables, to attach to a bug report."""
