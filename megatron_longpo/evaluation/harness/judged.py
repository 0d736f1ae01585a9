"""MT-Bench and LongBench-Chat: questions answered in chat, answers scored by a judge.

lm-evaluation-harness has neither, and no turns that build on an answer. Its model writes the
answers; the server client of `longpo generate` asks the judge. Answers and verdicts are kept in
`harness/SUITE/` as they come, so that what is there is not asked for again.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longpo.config.backends import BackendConfig
from megatron_longpo.config.evaluate import EvaluateConfig
from megatron_longpo.config.suites import HarnessSuite
from megatron_longpo.data.jsonl import JsonlFile, dump_line, write_whole
from megatron_longpo.errors import UserError
from megatron_longpo.evaluation.harness.judge_prompts import prompt_name, read_prompts, read_rating
from megatron_longpo.evaluation.harness.tasks import frame_tokens, without_middle
from megatron_longpo.generation.backends.base import BackendError, Request, Sampling
from megatron_longpo.generation.backends.factory import make_backend

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One conversation to be had."""

    id: str
    category: str
    turns: tuple[str, ...]
    """What the user says; a later one follows the model's answer."""
    shown: tuple[str, ...]
    """The same as the judge is shown it: without the long document."""
    references: tuple[str, ...]
    """Right answers, a turn each, as far as there are."""


def run_judged(
    config: EvaluateConfig,
    suite: HarnessSuite,
    model: Any,
    *,
    model_path: str,
    folder: Path,
    say: Say,
) -> list[dict[str, Any]]:
    """Cells of a suite, one a turn.

    Raises:
        UserError: for questions that cannot be read, or a judge that cannot be asked.
    """
    questions = read_questions(config, suite)
    folder.mkdir(parents=True, exist_ok=True)
    answers = _read(folder / "answers.jsonl")
    missing = [question for question in questions if question.id not in answers]
    if missing:
        say(f"{suite.name}: answering {len(missing)} questions")
        for question, texts in zip(missing, _answer(missing, suite, model), strict=True):
            answers[question.id] = {"id": question.id, "answers": texts}
        _write(folder / "answers.jsonl", answers)
    verdicts = _read(folder / "verdicts.jsonl")
    judging = _Judging(config, suite, model_path)
    failed = asyncio.run(judging.ask(questions, answers, verdicts))
    _write(folder / "verdicts.jsonl", verdicts)
    if failed:
        raise UserError(
            f"harness.judge: {len(failed)} of {suite.name}'s verdicts could not be had ({failed[0]}"
            f"); the others are kept in {folder}, and the same command asks again for the rest"
        )
    cells = _cells(suite, questions, verdicts)
    unread = sum(verdict["rating"] is None for verdict in verdicts.values())
    say(f"measured: {suite.name}" + (f"; {unread} verdicts without a rating" if unread else ""))
    return cells


# ------------------------------------------------------------------ questions


def read_questions(config: EvaluateConfig, suite: HarnessSuite) -> list[Question]:
    """Of `harness.data`/SUITE/questions.jsonl, or the hub."""
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


def _question(suite: HarnessSuite, where: str, row: dict[str, Any]) -> Question:
    """MT-Bench as FastChat or the hub has it; LongBench-Chat as LongAlign has it."""
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
    return Question(
        id=str(number),
        category=str(row.get("category", "")),
        turns=tuple(turns),
        shown=tuple(shown),
        references=tuple(references),
    )


# ------------------------------------------------------------------ answers


def _answer(questions: Sequence[Question], suite: HarnessSuite, model: Any) -> list[list[str]]:
    """Lets the harness's model answer, turn by turn, all questions of a turn together."""
    import torch
    from lm_eval.api.instance import Instance

    torch.manual_seed(0)
    tokenizer = model.tokenizer
    most = model.max_length - suite.new_tokens
    answers: list[list[str]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [index for index, one in enumerate(questions) if turn < len(one.turns)]
        requests = []
        for index in asked:
            question = questions[index]
            messages = []
            for said, answer in zip(question.turns, [*answers[index], None], strict=False):
                room = most - frame_tokens(tokenizer)
                messages.append(
                    {"role": "user", "content": without_middle(said, tokenizer, most=room)}
                )
                if answer is not None:
                    messages.append({"role": "assistant", "content": answer})
            temperature = suite.temperatures.get(question.category, 0.0)
            options: dict[str, Any] = {"until": [], "max_gen_toks": suite.new_tokens}
            options["do_sample"] = temperature > 0
            if temperature > 0:
                options["temperature"] = temperature
            requests.append(
                Instance(
                    request_type="generate_until",
                    doc={},
                    arguments=(model.apply_chat_template(messages), options),
                    idx=index,
                )
            )
        for index, text in zip(asked, model.generate_until(requests), strict=True):
            answers[index].append(text.strip())
    return answers


# ------------------------------------------------------------------ verdicts


class _Judging:
    """Asks the judge about every turn."""

    def __init__(self, config: EvaluateConfig, suite: HarnessSuite, model_path: str) -> None:
        harness = config.harness
        folder = None if harness.data is None else Path(harness.data) / suite.name
        self._prompts = read_prompts(folder)
        self._sampling = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=harness.judge_tokens)
        try:
            # The tokenizer counts nothing in chat; the judge's own limits hold.
            self._backend = make_backend(
                BackendConfig(
                    model=model_path,
                    backend="server",
                    context_length=2**31,
                    server=dataclasses.replace(harness.judge, api="chat"),
                )
            )
        except UserError as error:
            raise UserError(f"harness.judge: {error}") from None

    async def ask(
        self,
        questions: Sequence[Question],
        answers: dict[str, dict[str, Any]],
        verdicts: dict[str, dict[str, Any]],
    ) -> list[str]:
        """Fills `verdicts` by question and turn; returns why requests failed for good."""
        pending = [
            (question, turn)
            for question in questions
            for turn in range(len(question.turns))
            if f"{question.id} {turn}" not in verdicts
        ]
        requests = [self._request(one, turn, answers[one.id]["answers"]) for one, turn in pending]
        try:
            replies = await self._backend.complete(requests)
        except UserError as error:
            raise UserError(f"harness.judge: {error}") from None
        finally:
            await self._backend.close()
        failed = []
        for (question, turn), reply in zip(pending, replies, strict=True):
            if isinstance(reply, BackendError):
                failed.append(str(reply))
                continue
            key = f"{question.id} {turn}"
            verdicts[key] = {
                "id": key,
                "category": question.category,
                "rating": read_rating(reply.text),
                "verdict": reply.text,
            }
        return failed

    def _request(self, question: Question, turn: int, answers: Sequence[str]) -> Request:
        prompt = self._prompts[prompt_name(turn, question.references)]
        fields = {"question": question.shown[turn], "answer": answers[turn]}
        for number in range(turn + 1):
            fields[f"question_{number + 1}"] = question.shown[number]
            fields[f"answer_{number + 1}"] = answers[number]
            if number < len(question.references):
                fields[f"ref_answer_{number + 1}"] = question.references[number]
        messages: Any = prompt.messages(fields)
        return Request(messages=messages, sampling=self._sampling, seed=0)


def _cells(
    suite: HarnessSuite, questions: Sequence[Question], verdicts: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    cells = []
    turns = max(len(question.turns) for question in questions)
    for turn in range(turns):
        keys = [f"{one.id} {turn}" for one in questions if turn < len(one.turns)]
        ratings = [verdicts[key]["rating"] for key in keys]
        read = [rating for rating in ratings if rating is not None]
        if not read:
            raise UserError(
                f"harness.judge: none of {suite.name}'s verdicts has a rating such as [[5]]; look "
                "at verdicts.jsonl, and remove it to ask another judge"
            )
        cells.append(
            {
                "task": suite.name if turns == 1 else f"turn_{turn + 1}",
                "group": None,
                "length": None,
                "metric": "rating",
                "value": sum(read) / len(read),
                "stderr": None,
                "samples": len(read),
            }
        )
    return cells


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    lines = JsonlFile(path)
    return {lines[index]["id"]: lines[index] for index in range(len(lines))}


def _write(path: Path, lines: dict[str, dict[str, Any]]) -> None:
    write_whole(path, "".join(map(dump_line, lines.values())))
