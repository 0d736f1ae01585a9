"""MT-Bench and LongBench-Chat: questions answered in chat, answers scored by a judge.

lm-evaluation-harness has neither suite, and no turns that build on an answer. Its model writes the
answers; the server client of `longpo generate` asks the judge. Answers and verdicts are stored in
`harness/SUITE/`, so that a repeated command asks only for missing ones.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_longpo.config.backends import BackendConfig
from megatron_longpo.config.evaluate import EvaluateConfig
from megatron_longpo.config.suites import HarnessSuite
from megatron_longpo.data.jsonl import JsonlFile, dump_line, write_whole
from megatron_longpo.errors import UserError
from megatron_longpo.evaluation.harness.judge_prompts import prompt_name, read_prompts, read_rating
from megatron_longpo.evaluation.harness.judged_questions import JudgedQuestion, read_questions
from megatron_longpo.evaluation.harness.tasks import frame_tokens, without_middle
from megatron_longpo.generation.backends.base import BackendError, Request, Sampling
from megatron_longpo.generation.backends.factory import make_backend

Say = Callable[[str], None]


def run_judged(
    config: EvaluateConfig,
    suite: HarnessSuite,
    model: Any,
    *,
    model_path: str,
    folder: Path,
    say: Say,
) -> list[dict[str, Any]]:
    """Runs a judged suite and returns its cells, one for each turn.

    Raises:
        UserError: if questions cannot be read, or the judge cannot be reached.
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
            f"harness.judge: {len(failed)} of {suite.name}'s verdicts are missing ({failed[0]}"
            f"); the others are kept in {folder}, and the same command asks again for the rest"
        )
    cells = _cells(suite, questions, verdicts)
    unread = sum(verdict["rating"] is None for verdict in verdicts.values())
    say(f"measured: {suite.name}" + (f"; {unread} verdicts without a rating" if unread else ""))
    return cells


# ------------------------------------------------------------------ answers


def _answer(
    questions: Sequence[JudgedQuestion], suite: HarnessSuite, model: Any
) -> list[list[str]]:
    """Lets the harness's model answer turn by turn, all questions of a turn in one call."""
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
            # In chat, tokens are not counted; the judge's own limits apply.
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
        questions: Sequence[JudgedQuestion],
        answers: dict[str, dict[str, Any]],
        verdicts: dict[str, dict[str, Any]],
    ) -> list[str]:
        """Fills `verdicts` by question and turn; returns the errors of failed requests."""
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

    def _request(self, question: JudgedQuestion, turn: int, answers: Sequence[str]) -> Request:
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
    suite: HarnessSuite, questions: Sequence[JudgedQuestion], verdicts: dict[str, dict[str, Any]]
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
