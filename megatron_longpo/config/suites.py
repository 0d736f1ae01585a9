"""Suites: one YAML file each, with the LongPO paper's settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_longpo.config.harness import HarnessConfig
from megatron_longpo.errors import UserError, nearest

FOLDER = Path(__file__).with_name("suite_files")


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessSuite:
    """A suite's file, with what the settings change of it."""

    name: str
    tasks: dict[str, str | None] = field(default_factory=dict)
    """Names, or tags, of the harness's tasks; and the group that each belongs to."""
    folders: tuple[str, ...] = ()
    """Of the harness's task files, or ours/."""
    metric: str = "score"
    """The one that is reported."""
    shots: int = 0
    chat_template: bool
    lengths: tuple[int, ...] | None = None
    samples: int | None = None
    """Most of a task; None = all."""
    shortened: str | None = None
    """A column that loses its middle where the prompt is too long."""
    mean: Literal["tasks", "groups", "samples"]
    """What weighs the same in the suite's number."""
    judged: str | None = None
    """The kind of a suite that a judge scores."""
    questions: str | None = None
    """Its hub id."""
    new_tokens: int = 0
    """Most tokens of its answers."""
    temperatures: dict[str, float] = field(default_factory=dict)
    """By category of its questions; others are answered greedily."""

    @property
    def has_options(self) -> bool:
        """Whether answers are chosen by log-likelihood, and nothing is written."""
        return self.metric.startswith("acc")


def suite_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_suite(name: str, config: HarnessConfig) -> HarnessSuite:
    """A suite as the settings want it.

    Raises:
        UserError: for an unknown name or settings that do not fit the suite.
    """
    path = FOLDER / f"{name}.yaml"
    if name not in suite_names():
        guess = nearest(name, suite_names())
        hint = f"The nearest is {guess}" if guess else f"There are {', '.join(suite_names())}"
        raise UserError(f"suite ({name}): no such suite. {hint}")
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    groups = values.pop("tasks", {})
    if isinstance(groups, list):
        tasks: dict[str, str | None] = dict.fromkeys(groups)
    else:
        tasks = {task: group for group, names in groups.items() for task in names}
    for key in ("folders", "lengths"):
        if values.get(key) is not None:
            values[key] = tuple(values[key])
    if values.get("lengths") and config.lengths is not None:
        values["lengths"] = config.lengths
    for key in ("samples", "chat_template"):
        if getattr(config, key) is not None:
            values[key] = getattr(config, key)
    suite = HarnessSuite(name=name, tasks=tasks, **values)
    if suite.lengths is not None and (not suite.lengths or min(suite.lengths) < 1):
        raise UserError("harness.lengths: must be one or more numbers above 0, such as [4096]")
    if config.backend == "megatron" and not suite.has_options:
        raise UserError(
            f"harness.backend (megatron): scores options, and {name} lets the model write. Use hf "
            "or vllm on an exported model (longpo convert export)"
        )
    if suite.judged is not None and not config.judge.endpoints:
        raise UserError(
            f"harness.judge.endpoints ([]): {name} is scored by a judge. Give the URL of an "
            "OpenAI-compatible server, such as [http://localhost:8000/v1]"
        )
    return suite


def check_only(only: Sequence[str] | None, known: Sequence[str]) -> None:
    """Raises UserError for a name in harness.tasks that no suite has."""
    for name in only or ():
        if name not in known:
            guess = nearest(name, known)
            hint = f"The nearest is {guess}" if guess else f"There are {', '.join(known)}"
            raise UserError(f"harness.tasks ({name}): not in these suites. {hint}")
