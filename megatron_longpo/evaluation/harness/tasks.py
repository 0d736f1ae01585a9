"""Loads tasks of lm-evaluation-harness for a suite, with rows from the hub or from files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longpo.config.harness import HarnessConfig
from megatron_longpo.config.suites import HarnessSuite
from megatron_longpo.errors import UserError
from megatron_longpo.evaluation.harness.ruler_files import files_folder

TASK_FILES = Path(__file__).with_name("task_files")
"""Our task files: a suite's `folders` that begin with ours/ are searched here."""

JOINT = 8
"""Tokens kept free where texts are joined: together they may become more tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The unit that is run, recorded and resumed: a task, or a task at one of its lengths."""

    task: str
    group: str | None
    length: int | None

    @property
    def file_name(self) -> str:
        return self.task if self.length is None else f"{self.task}-{self.length}"


def folders_of(suite: HarnessSuite) -> list[Path]:
    """Returns folders of task files. Only these are searched: the harness has 14,000 tasks."""
    import lm_eval

    theirs = Path(lm_eval.__file__).parent / "tasks"
    return [
        TASK_FILES / name.removeprefix("ours/") if name.startswith("ours/") else theirs / name
        for name in suite.folders
    ]


def parts_of(suite: HarnessSuite) -> list[Part]:
    """Returns all parts of a suite in order, with lengths as the outer loop."""
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_defaults=False, include_path=folders_of(suite)).task_index
    tasks: dict[str, str | None] = {}
    for name, group in suite.tasks.items():
        entry = index.get(name)
        if entry is None:
            raise UserError(
                f"suite ({suite.name}): this lm-eval has no task {name}; install the version that "
                "constraints.txt names"
            )
        leaves = sorted(entry.tags) if entry.kind.name == "TAG" else [name]
        tasks |= dict.fromkeys(leaves, group)
    return [
        Part(task=task, group=group, length=length)
        for length in suite.lengths or (None,)
        for task, group in tasks.items()
    ]


def load_task(suite: HarnessSuite, part: Part, config: HarnessConfig, *, tokenizer: str) -> Any:
    """Loads the harness's task object with its rows.

    Raises:
        UserError: if rows cannot be read or made.
    """
    from lm_eval.tasks import TaskManager

    metadata: dict[str, Any] = {}
    if part.length is not None:
        metadata = {
            "tokenizer": tokenizer,
            "length": part.length,
            "samples": suite.samples,
            "seed": config.seed,
            "files": str(files_folder(config.data)),
            "chat_template": suite.chat_template,
        }
    manager = TaskManager(include_defaults=False, include_path=folders_of(suite), metadata=metadata)
    entry = manager.task_index[part.task]
    spec: Any = part.task
    if config.data is not None and part.length is None:
        spec = {"group": "local", "task": [{"task": part.task, **_local(entry, config.data)}]}
    try:
        return manager.load([spec])["tasks"][part.task]
    except UserError:
        raise
    except Exception as error:  # hub, files and datasets raise many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"suite ({suite.name}): the rows of {part.task} could not be read ({reason}). It reads "
            "the hub; where that cannot be reached, give local files: harness.data"
        ) from error


def _local(entry: Any, data: str) -> dict[str, Any]:
    """Returns config keys that make a task read local files in its own format."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(entry.yaml_path, resolve_func=False)
    folder = Path(data) / str(config["dataset_path"]).replace("/", "__")
    if config.get("dataset_name") and (folder / config["dataset_name"]).is_dir():
        folder /= config["dataset_name"]
    files = {path.stem: str(path) for path in sorted(folder.glob("*.jsonl"))}
    if not files:
        raise UserError(
            f"harness.data ({data}): has no {folder}/*.jsonl for {entry.name}; put the data set "
            f"{config['dataset_path']} there, a file SPLIT.jsonl for each split"
        )
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }


def shorten(task: Any, column: str, *, tokenizer: Any, most: int, chat_template: bool) -> int:
    """Removes the middle of `column` in rows whose prompt and answer exceed `most` tokens.

    Returns:
        The number of shortened rows.

    Raises:
        UserError: if a prompt is too long even without its document.
    """
    split = task.config.test_split
    room = most - int(task.config.generation_kwargs["max_gen_toks"])
    room -= frame_tokens(tokenizer) if chat_template else 0
    shortened = 0

    def fit(row: dict[str, Any]) -> dict[str, Any]:
        nonlocal shortened
        over = len(tokenizer(task.doc_to_text(row)).input_ids) - room
        if over <= 0:
            return row
        keep = len(tokenizer(row[column], add_special_tokens=False).input_ids) - over
        if keep < 2 * JOINT:
            raise UserError(
                f"harness.max_length ({most}): {task.config.task} has a question that does not fit "
                "even without its document; set more"
            )
        shortened += 1
        return {**row, column: without_middle(row[column], tokenizer, most=keep)}

    task.dataset[split] = task.dataset[split].map(fit, load_from_cache_file=False)
    return shortened


def without_middle(text: str, tokenizer: Any, *, most: int) -> str:
    """Returns both ends of a text, with at most `most` tokens in total."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) <= most:
        return text
    half = (most - JOINT) // 2
    return str(tokenizer.decode(ids[:half])) + str(tokenizer.decode(ids[len(ids) - half :]))


def frame_tokens(tokenizer: Any) -> int:
    """Returns the tokens of the chat template around a user's message, plus `JOINT`."""
    empty = tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True
    )
    return len(tokenizer(empty, add_special_tokens=False).input_ids) + JOINT
