"""`longpo judge`: a model scores the answers of preference examples.

It answers three requests about each turn and its chunk: how well the chunk supports the chosen
answer, and, once in each order, which answer is better, since judges favour a place.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_longpo.config.judge import JudgeConfig
from megatron_longpo.data.jsonl import refuse_existing
from megatron_longpo.data.progress import format_counts, track
from megatron_longpo.data.text.chat import prompt_ids
from megatron_longpo.data.text.examples import Example, ExampleFile, Turn, write_examples
from megatron_longpo.data.text.prompt_layout import opening_messages
from megatron_longpo.errors import UserError
from megatron_longpo.generation.backends.base import (
    Backend,
    BackendError,
    Completion,
    Request,
    Sampling,
)
from megatron_longpo.generation.backends.factory import make_backend
from megatron_longpo.generation.judge.scores import ScoreFile, TurnScores
from megatron_longpo.generation.judge.verdicts import read_preference, read_score
from megatron_longpo.generation.questions.prompts import BETTER_REQUEST, SUPPORT_REQUEST
from megatron_longpo.generation.shards.failures import FailuresInARow
from megatron_longpo.generation.shards.manifest import model_fingerprint


@dataclass(kw_only=True)
class JudgeSummary:
    """The numbers of a run."""

    num_examples: int = 0
    num_turns: int = 0
    num_kept: int = 0
    num_kept_turns: int = 0
    scores: list[TurnScores] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        text = (
            f"{self.num_kept} of {self.num_examples} examples with {self.num_kept_turns} of "
            f"{self.num_turns} turns"
        )
        for name in ("support", "better"):
            values = [v for s in self.scores if (v := getattr(s, name)) is not None]
            mean = f"{sum(values) / len(values):.2f}" if values else "none"
            text += f"; {name} {mean} on average ({len(values)} read)"
        if self.dropped:
            text += f"; dropped: {format_counts(self.dropped)}"
        return text


def run_judge(config: JudgeConfig) -> JudgeSummary:
    """Writes the examples with their scores, and prints a summary."""
    refuse_existing(config.output, overwrite=config.overwrite, key="output")
    examples = ExampleFile(config.examples)
    output = Path(config.output)
    fingerprint = _fingerprint(config, examples)
    with ScoreFile.opened(output, fingerprint, overwrite=config.overwrite) as file:
        failed = _judge_missing(config, examples, file)
        if failed and not config.skip_failed:
            raise UserError(
                f"{config.examples}: {failed.total()} of {len(examples)} examples could not be "
                f"judged ({format_counts(failed)}); scores are kept in {file.path}, and the same "
                "command asks again for the rest. --skip_failed true leaves them out"
            )
        summary = JudgeSummary(dropped=Counter({f"example: {k}": n for k, n in failed.items()}))
        write_examples(output, _kept(config, examples, file, summary))
        file.remove()
    print(f"{output}: {summary}")
    return summary


def _judge_missing(config: JudgeConfig, examples: ExampleFile, file: ScoreFile) -> Counter[str]:
    """Scores what has no scores yet; returns how many could not be scored, by reason."""
    missing = [index for index in range(len(examples)) if index not in file.scores]
    if not missing:
        return Counter()
    work = _Judging(config, examples, make_backend(config), file)
    asyncio.run(work.run(missing))
    return work.failed


class _Judging:
    """Asks about the examples, several at a time, and appends the scores of each when done."""

    def __init__(
        self, config: JudgeConfig, examples: ExampleFile, backend: Backend, file: ScoreFile
    ) -> None:
        self._config = config
        self._examples = examples
        self._backend = backend
        self._file = file
        self._failures = FailuresInARow(backend.documents_at_once)
        self.failed: Counter[str] = Counter()

    async def run(self, indices: Sequence[int]) -> None:
        queue = iter(track(indices, description="judge", total=len(indices)))
        workers = [
            asyncio.create_task(self._work(queue)) for _ in range(self._backend.documents_at_once)
        ]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await self._backend.close()

    async def _work(self, queue: Iterator[int]) -> None:
        for index in queue:
            example = self._examples[index]
            scores = []
            for turn in example.turns:
                judged = await self._judge(turn, example.document)
                if isinstance(judged, BackendError):
                    self.failed[str(judged)] += 1
                    self._failures.failed(example.source, str(judged))
                    break
                scores.append(judged)
            else:
                self._file.append(index, scores)
                self._failures.succeeded()

    async def _judge(self, turn: Turn, document: str) -> TurnScores | BackendError:
        context = document if turn.chunk is None else turn.chunk
        requests = [
            self._request(context, text)
            for text in (
                SUPPORT_REQUEST.format(question=turn.question, answer=turn.chosen),
                BETTER_REQUEST.format(
                    question=turn.question, first=turn.chosen, second=turn.rejected
                ),
                BETTER_REQUEST.format(
                    question=turn.question, first=turn.rejected, second=turn.chosen
                ),
            )
        ]
        room = self._backend.context_length - self._config.max_new_tokens
        tokenizer = self._backend.tokenizer
        if any(len(prompt_ids(tokenizer, request.messages)) > room for request in requests):
            return TurnScores(support=None, better=None)  # the judge cannot read it
        replies: list[Completion] = []
        for reply in await self._backend.complete(requests):
            if isinstance(reply, BackendError):
                return reply
            replies.append(reply)
        first, swapped = (read_preference(reply.text) for reply in replies[1:])
        orders = [
            value
            for value in (first, None if swapped is None else 1 - swapped)
            if value is not None
        ]
        # One order alone would say which place the judge favours.
        better = sum(orders) / 2 if len(orders) == 2 else None
        return TurnScores(support=read_score(replies[0].text), better=better)

    def _request(self, context: str, text: str) -> Request:
        sampling = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=self._config.max_new_tokens)
        return Request(
            messages=tuple(opening_messages(None, context, text)), sampling=sampling, seed=0
        )


def _kept(
    config: JudgeConfig, examples: ExampleFile, file: ScoreFile, summary: JudgeSummary
) -> Iterator[Example]:
    """Yields examples with their scores, without turns below the thresholds; counts both.

    Raises:
        UserError: at the end, if no example was left.
    """
    for index, example in enumerate(examples):
        summary.num_examples += 1
        summary.num_turns += len(example.turns)
        if index not in file.scores:
            continue
        scores = file.scores[index]
        summary.scores += scores
        keep = []
        for number, score in enumerate(scores):
            reason = _fault(config, score)
            if reason is None:
                keep.append(number)
            else:
                summary.dropped[reason] += 1
        if keep:
            summary.num_kept += 1
            summary.num_kept_turns += len(keep)
            yield _with_scores(example, scores, keep, Path(config.model).name)
    if summary.num_kept == 0:
        raise UserError(
            f"{config.examples}: no example is left ({format_counts(summary.dropped)}); set "
            f"least_support or least_better lower. Scores are kept in {file.path}"
        )


def _fault(config: JudgeConfig, score: TurnScores) -> str | None:
    """Returns why a turn is dropped, or None."""
    for name, value, least in (
        ("support", score.support, config.least_support),
        ("better", score.better, config.least_better),
    ):
        if least is not None and value is None:
            return f"turn: {name} unknown"
        if least is not None and value is not None and value < least:
            return f"turn: {name} below least_{name}"
    return None


def _with_scores(
    example: Example, scores: Sequence[TurnScores], keep: Sequence[int], judge: str
) -> Example:
    """Returns the example with the turns in `keep`; lists of `meta` with an item a turn alike."""
    meta: dict[str, Any] = {
        key: [value[number] for number in keep]
        if isinstance(value, list) and len(value) == len(example.turns)
        else value
        for key, value in example.meta.items()
    }
    meta["judge"] = {
        "model": judge,
        "support": [scores[number].support for number in keep],
        "better": [scores[number].better for number in keep],
    }
    turns = tuple(example.turns[number] for number in keep)
    return dataclasses.replace(example, turns=turns, meta=meta)


def _fingerprint(config: JudgeConfig, examples: ExampleFile) -> str:
    """Returns a hash of the examples and of all settings that change a score."""
    settings = {
        "examples": examples.fingerprint,
        "model": model_fingerprint(config.model),
        "backend": config.backend,
        "server": [config.server.model, config.server.api, config.server.extra_body],
        "chat_template": config.chat_template,
        "context_length": config.context_length,
        "rope_theta": config.rope_theta,
        "dtype": config.dtype,
        "max_new_tokens": config.max_new_tokens,
        "prompts": [SUPPORT_REQUEST, BETTER_REQUEST],
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
