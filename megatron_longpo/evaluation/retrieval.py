"""Rows of numbers hidden in long texts, with questions that ask for them.

A question is teacher-forced: the answer's words are given. The number counts as found if each of
its tokens is the most likely next one, and the answer as ended if the end of the turn is the most
likely token after its full stop. One row is one text; the questions of `multi_needle` about one
text share it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_longpo.config.evaluation import RetrievalConfig
from megatron_longpo.config.names import RetrievalKind
from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer
from megatron_longpo.errors import UserError
from megatron_longpo.evaluation.frames import Frame, make_frame, plain_ids
from megatron_longpo.evaluation.haystack import Haystack, read_haystack
from megatron_longpo.evaluation.probes import ProbeBranch, ProbeRow, ProbeSet

KEY = "evaluation.retrieval"

PLACES = (
    *("lighthouse", "bakery", "observatory", "greenhouse", "windmill", "chapel", "ferry"),
    *("quarry", "vineyard", "archive", "foundry", "aviary", "brewery", "theatre", "tannery"),
    *("orchard", "museum", "stable", "cellar", "printshop"),
)
"""Names for the numbers of `multi_needle`."""

NUM_DIGITS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One number of one row."""

    kind: RetrievalKind
    length: int
    """As in the config: the most tokens of the row."""
    depth: float
    sample: int
    row: int
    group: int
    """Group of this number's tokens in the row."""
    end_group: int
    """Group of the token that ends the answer."""
    value: str
    prompt_tokens: int
    """Tokens of the question's branch before the answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalSet:
    """All rows of a config, and their questions."""

    probes: ProbeSet
    questions: tuple[Question, ...]

    def split(self) -> Iterator[RetrievalSet]:
        """Yields a set for every kind and length, with the same rows."""
        groups: dict[tuple[RetrievalKind, int], list[Question]] = {}
        for question in self.questions:
            groups.setdefault((question.kind, question.length), []).append(question)
        for questions in groups.values():
            rows = list(dict.fromkeys(question.row for question in questions))
            yield RetrievalSet(
                probes=ProbeSet([self.probes.rows[row] for row in rows]),
                questions=tuple(
                    replace(question, row=rows.index(question.row)) for question in questions
                ),
            )

    def prompt(self, question: Question) -> np.ndarray:
        """Returns the token ids before the answer."""
        branch = self.probes.rows[question.row].branches[question.group]
        return branch.input_ids[: question.prompt_tokens]


def make_retrieval(config: RetrievalConfig, tokenizer: ChatTokenizer) -> RetrievalSet:
    """Makes rows of every kind, length, depth and sample.

    Raises:
        UserError: if a haystack cannot be read, or a length leaves no room for a text.
    """
    haystack = read_haystack(config.haystack, tokenizer, key=f"{KEY}.haystack")
    if "multi_needle" in config.kinds and len(config.depths) > len(PLACES):
        raise UserError(
            f"{KEY}.depths: multi_needle hides a number at each of {len(config.depths)} depths and "
            f"has names for {len(PLACES)}; give fewer"
        )
    maker = _RowMaker(config=config, tokenizer=tokenizer, haystack=haystack)
    for kind in config.kinds:
        for length in config.lengths:
            for sample in range(config.samples):
                if kind == "passkey":
                    maker.add_passkeys(length, sample)
                else:
                    maker.add_multi_needle(length, sample)
    return RetrievalSet(probes=ProbeSet(maker.rows), questions=tuple(maker.questions))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Needle:
    """A number, its sentence, and the question that asks for it."""

    value: str
    ids: np.ndarray
    frame: Frame


class _RowMaker:
    def __init__(
        self, *, config: RetrievalConfig, tokenizer: ChatTokenizer, haystack: Haystack
    ) -> None:
        self.rows: list[ProbeRow] = []
        self.questions: list[Question] = []
        self._config = config
        self._tokenizer = tokenizer
        self._haystack = haystack

    def add_passkeys(self, length: int, sample: int) -> None:
        """Adds a row for each depth: the same text with different numbers."""
        rng = self._rng("passkey", length, sample)
        start = rng.randrange(len(self._haystack.ids))
        for depth in self._config.depths:
            needle = self._needle(rng, "The pass key", "Remember it: {} is the pass key.")
            self._add_row("passkey", length, sample, start, [needle], [depth])

    def add_multi_needle(self, length: int, sample: int) -> None:
        """Adds one row with a number at each depth, each of another place."""
        rng = self._rng("multi_needle", length, sample)
        start = rng.randrange(len(self._haystack.ids))
        depths = self._config.depths
        needles = [
            self._needle(rng, f"The pass key of the {place}")
            for place in rng.sample(PLACES, len(depths))
        ]
        self._add_row("multi_needle", length, sample, start, needles, depths)

    def _rng(self, kind: RetrievalKind, length: int, sample: int) -> random.Random:
        return random.Random(f"{self._config.seed} {kind} {length} {sample}")

    def _needle(self, rng: random.Random, subject: str, reminder: str = "") -> _Needle:
        digits = [rng.randrange(1, 10) for _ in range(NUM_DIGITS)]
        value = "".join(map(str, digits))
        # Other digits at both ends, as `make_frame` requires.
        other = "".join(str(digit % 9 + 1) for digit in digits)
        sentence = f"{subject} is {value}. {reminder.format(value)}".rstrip()
        # Small models answer this with exactly the words of the answer below.
        question = f"Which number is {subject[0].lower()}{subject[1:]} in the text above?"
        return _Needle(
            value=value,
            ids=np.array(plain_ids(self._tokenizer, f"\n\n{sentence}\n\n"), dtype=np.int32),
            frame=make_frame(
                self._tokenizer, question, f"{subject} is {value}.", f"{subject} is {other}."
            ),
        )

    def _add_row(
        self,
        kind: RetrievalKind,
        length: int,
        sample: int,
        start: int,
        needles: Sequence[_Needle],
        depths: Sequence[float],
    ) -> None:
        """Adds a row: one text with its needles, and a branch for each question."""
        around = max(len(needle.frame) for needle in needles)
        room = length - around - sum(len(needle.ids) for needle in needles)
        if room < 1:
            raise UserError(
                f"{KEY}.lengths ({length}): question, answer and numbers alone take "
                f"{length - room} tokens of {self._tokenizer.name}; use a greater length"
            )
        text = _hide(*self._haystack.take(start, room), needles, depths)
        branches = []
        for group, (needle, depth) in enumerate(zip(needles, depths, strict=True)):
            frame = needle.frame
            before = len(frame.head) + len(text)
            end_group = len(needles) + group
            value = np.arange(frame.value.start, frame.value.stop)
            branches.append(
                ProbeBranch(
                    input_ids=np.concatenate([frame.head, text, frame.tail]),
                    targets=np.append(value, frame.end) + before,
                    groups=np.append(np.full(len(value), group), end_group),
                )
            )
            self.questions.append(
                Question(
                    kind=kind,
                    length=length,
                    depth=depth,
                    sample=sample,
                    row=len(self.rows),
                    group=group,
                    end_group=end_group,
                    value=needle.value,
                    prompt_tokens=before + frame.answer_start,
                )
            )
        row_id = f"{kind} {length} {sample} {','.join(f'{depth:g}' for depth in depths)}"
        self.rows.append(ProbeRow(id=row_id, branches=tuple(branches)))


def _hide(
    ids: np.ndarray, is_end: np.ndarray, needles: Sequence[_Needle], depths: Sequence[float]
) -> np.ndarray:
    """Inserts each needle at the end of a sentence, the one nearest to its depth."""
    cuts = np.concatenate([[0], np.flatnonzero(is_end) + 1, [len(ids)]])
    places = [int(cuts[np.abs(cuts - depth * len(ids)).argmin()]) for depth in depths]
    parts: list[np.ndarray] = []
    done = 0
    for index in sorted(range(len(needles)), key=lambda index: depths[index]):
        parts += [ids[done : places[index]], needles[index].ids]
        done = places[index]
    return np.concatenate([*parts, ids[done:]])
