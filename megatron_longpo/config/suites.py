"""Suites of benchmarks: one YAML file each, with the LongPO paper's settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_longpo.config.backends import check_server
from megatron_longpo.config.harness import HarnessConfig
from megatron_longpo.errors import UserError, nearest

FOLDER = Path(__file__).with_name("suite_files")


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessSuite:
    """A suite's file, with what the config changes of it."""

    name: str
    tasks: dict[str, str | None] = field(default_factory=dict)
    """Name, or tag, of each of the harness's tasks -> the group that it belongs to."""
    folders: tuple[str, ...] = ()
    """Folders of task files: the harness's, or ours if they begin with ours/."""
    metric: str = "score"
    """The metric that is reported."""
    shots: int = 0
    chat_template: bool
    lengths: tuple[int, ...] | None = None
    samples: int | None = None
    """Maximum samples of a task; None = all."""
    shortened: str | None = None
    """The column that is cut in its middle if the prompt is too long."""
    mean: Literal["tasks", "groups", "samples"]
    """What has equal weight in the suite's number."""
    judged: str | None = None
    """Kind of a suite that a judge scores; None = no judge."""
    questions: str | None = None
    """Hub id of its questions."""
    new_tokens: int = 0
    """Maximum tokens of its answers."""
    temperatures: dict[str, float] = field(default_factory=dict)
    """Sampling temperature by category of question; other questions are answered greedily."""

    @property
    def has_options(self) -> bool:
        """Whether the model chooses among options by log-likelihood, and writes nothing."""
        return self.metric.startswith("acc")


def suite_names() -> list[str]:
    """Returns the names of all suites."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_suite(name: str, config: HarnessConfig) -> HarnessSuite:
    """Returns a suite, changed as the config says.

    Raises:
        UserError: for an unknown name, or a config that does not fit the suite.
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
    if suite.lengths == ():
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
    if suite.judged is not None:
        check_server(config.judge, key="harness.judge")
    return suite


def check_only(only: Sequence[str] | None, known: Sequence[str]) -> None:
    """Raises UserError for a name in harness.tasks that no suite has."""
    for name in only or ():
        if name not in known:
            guess = nearest(name, known)
            hint = f"The nearest is {guess}" if guess else f"There are {', '.join(known)}"
            raise UserError(f"harness.tasks ({name}): not in these suites. {hint}")
