"""Reads the questions of suites that a judge scores, from files or the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longpo.config.evaluate import EvaluateConfig
from megatron_longpo.config.suites import HarnessSuite
from megatron_longpo.data.jsonl import JsonlFile
from megatron_longpo.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedQuestion:
    """One conversation of a judged suite."""

    id: str
    category: str
    turns: tuple[str, ...]
    """The user's messages; each later one follows the model's answer."""
    shown: tuple[str, ...]
    """The messages as shown to the judge: without the long document."""
    references: tuple[str, ...]
    """Right answers, one for each turn, as far as they exist."""


def read_questions(config: EvaluateConfig, suite: HarnessSuite) -> list[JudgedQuestion]:
    """Reads `harness.data`/SUITE/questions.jsonl, or the hub."""
    folder = None if config.harness.data is None else Path(config.harness.data) / suite.name
    if folder is not None and (folder / "questions.jsonl").is_file():
        lines = JsonlFile(folder / "questions.jsonl")
        rows = [(lines.where(index), lines[index]) for index in range(len(lines))]
    elif suite.questions is None or folder is not None:
        place = folder or Path("DATA") / suite.name
        raise UserError(
            f"suite ({suite.name}): its questions are read from {place}/questions.jsonl, which is "
            "not there; put them there and give --harness.data (docs/evaluation.md has the format)"
        )
    else:
        rows = _from_hub(suite)
    questions = [_question(suite, where, row) for where, row in rows]
    if len({question.id for question in questions}) != len(questions):
        raise UserError(f"suite ({suite.name}): two questions have the same id; number them")
    return questions[: suite.samples]


def _from_hub(suite: HarnessSuite) -> list[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        rows = datasets.load_dataset(suite.questions, split="train")
    except Exception as error:  # the hub and datasets raise many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"suite ({suite.name}): {suite.questions} could not be read ({reason}). Where the hub "
            "cannot be reached, give local files: harness.data"
        ) from error
    return [(f"{suite.questions}, row {index}", dict(row)) for index, row in enumerate(rows)]


def _question(suite: HarnessSuite, where: str, row: dict[str, Any]) -> JudgedQuestion:
    """Reads MT-Bench in FastChat's or the hub's format, LongBench-Chat in LongAlign's."""
    number = next((row[key] for key in ("question_id", "prompt_id", "idx") if key in row), where)
    try:
        if suite.judged == "longbench_chat":
            turns: Sequence[str] = [row["prompt"]]
            shown: Sequence[str] = [row["query"]]
            references: Sequence[str] = [row["answer"]]
        else:
            turns = shown = row["turns"] if "turns" in row else row["prompt"]
            references = row.get("reference") or []
    except KeyError as error:
        raise UserError(f"{where}: has no {error}; docs/evaluation.md has the format") from None
    if not turns or not all(isinstance(text, str) for text in (*turns, *shown, *references)):
        raise UserError(f"{where}: questions and references must be texts; correct it")
    return JudgedQuestion(
        id=str(number),
        category=str(row.get("category", "")),
        turns=tuple(turns),
        shown=tuple(shown),
        references=tuple(references),
    )
