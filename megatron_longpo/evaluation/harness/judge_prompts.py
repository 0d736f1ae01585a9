"""Prompts that ask a judge to grade an answer, and the reading of its grade.

The words are ours. For scores comparable with published ones, put the benchmark's own prompts into
`harness.data`: SUITE/judge_prompts.jsonl, an object a line with `name` (one of `NAMES`),
`system_prompt` and `prompt_template`, as in FastChat's file for MT-Bench.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_longpo.data.jsonl import JsonlFile
from megatron_longpo.errors import UserError

NAMES = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
"""For a first turn, a first turn with reference answer, a second turn, one with references."""

SYSTEM = "You grade the answers of an AI assistant, carefully and without favour."
_ASK = (
    "Grade the assistant's answer to the user's question. Look at whether it is correct, whether "
    "it helps, whether it stays with the question, and how deep and how detailed it is.{compare} "
    "First say in a few sentences what is good and what is wrong. Then give a grade from 1 (worst) "
    "to 10 (best), written exactly like this: [[grade]], for example [[5]].\n\n"
)
_COMPARE = (
    " The reference answer below is right: compare with it, and take points off for every mistake."
)
_SECOND = "There are two questions; grade the answer to the second one.\n\n"
_FIRST_TURN = "Question:\n{question}\n\nThe assistant's answer:\n{answer}\n"
_REFERENCE = "Reference answer:\n{ref_answer_1}\n\n"
_TURNS = (
    "First question:\n{question_1}\n\nThe assistant's first answer:\n{answer_1}\n\n"
    "Second question:\n{question_2}\n\nThe assistant's second answer:\n{answer_2}\n"
)
_REFERENCES = (
    "Reference answer to the first question:\n{ref_answer_1}\n\n"
    "Reference answer to the second question:\n{ref_answer_2}\n\n"
)
_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*(?:/\s*10)?\s*\]\]")


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgePrompt:
    """A system message, and a user message with fields in braces."""

    system: str
    template: str

    def messages(self, fields: Mapping[str, str]) -> tuple[dict[str, str], ...]:
        """Returns both messages with the fields filled in; unknown fields stay."""
        text = self.template
        # Not str.format: templates may have other braces, and answers may hold any text.
        text = re.sub(r"\{(\w+)\}", lambda match: fields.get(match.group(1), match.group(0)), text)
        return ({"role": "system", "content": self.system}, {"role": "user", "content": text})


OURS = {
    name: JudgePrompt(system=SYSTEM, template=template)
    for name, template in zip(
        NAMES,
        (
            _ASK.format(compare="") + _FIRST_TURN,
            _ASK.format(compare=_COMPARE) + _REFERENCE + _FIRST_TURN,
            _ASK.format(compare="") + _SECOND + _TURNS,
            _ASK.format(compare=_COMPARE) + _SECOND + _REFERENCES + _TURNS,
        ),
        strict=True,
    )
}


def read_prompts(folder: Path | None) -> dict[str, JudgePrompt]:
    """Reads the folder's prompts, and takes ours for those that it lacks."""
    prompts = dict(OURS)
    path = None if folder is None else folder / "judge_prompts.jsonl"
    if path is None or not path.is_file():
        return prompts
    lines = JsonlFile(path)
    for index in range(len(lines)):
        line = lines[index]
        name = line.get("name")
        if name in NAMES:
            if not isinstance(line.get("prompt_template"), str):
                raise UserError(f"{lines.where(index)}: {name} has no prompt_template; give one")
            prompts[name] = JudgePrompt(
                system=str(line.get("system_prompt") or SYSTEM), template=line["prompt_template"]
            )
    return prompts


def prompt_name(turn: int, references: Sequence[str]) -> str:
    """Returns the prompt's name for turn 0 or 1, with references if all turns so far have one."""
    math = "-math" if len(references) > turn and all(references[: turn + 1]) else ""
    return f"single{math}-v1" + ("-multi-turn" if turn else "")


def read_rating(text: str) -> float | None:
    """Returns the last grade in a verdict; None if there is none from 1 to 10."""
    found = [float(value) for value in _RATING.findall(text)]
    return found[-1] if found and 1 <= found[-1] <= 10 else None
