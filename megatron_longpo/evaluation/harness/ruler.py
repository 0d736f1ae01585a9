"""RULER's tasks, with samples by lm-evaluation-harness's generators from files on this machine.

The harness's own `ruler` tasks read the web, always make 500 samples of each length, and count
neither the chat template nor the beginning of the answer. Here a task has one length and the
requested number of samples, and every prompt with its answer fits the length. Two more differences,
both as in RULER's own code: `cwe` has its example, and any right answer to a question counts.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.errors import UserError
from megatron_longpo.evaluation.harness.ruler_makers import MAKERS, RulerSample

NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
"""Tokens reserved for an answer, as in the task files."""


def make_rows(
    *,
    maker: str,
    tokenizer: str,
    length: int,
    samples: int,
    seed: int,
    files: str,
    chat_template: bool,
    **shape: Any,
) -> dict[str, Any]:
    """Makes the split `test` of one task at one length; lm-eval calls it with a task's metadata.

    Args:
        tokenizer: Folder or hub id.
        length: The most tokens of a prompt and its answer, chat template included.
        files: Folder of `FILES`.
        shape: The rest of the task file's metadata.

    Raises:
        UserError: if the task does not fit the length.
    """
    import datasets
    from lm_eval.tasks.ruler.common_utils import get_tokenizer

    tokens = get_tokenizer(tokenizer)
    for key in ("version", "config_source"):  # of the harness
        shape.pop(key, None)
    name = f"{maker} {json.dumps(shape, sort_keys=True)}"
    with quiet():
        generate = MAKERS[maker](tokens=tokens, files=Path(files), length=length, **shape)
        most = length - 2 * len(tokens(_frame(tokens, "", "", chat_template)).input_ids)
        for _ in range(8):
            random.seed(f"{seed} {name} {length}")
            np.random.seed((seed * 7919 + length) % 2**32)
            rows = generate(most, samples)
            for row in rows:
                text = _frame(tokens, row["input"], row["gen_prefix"], chat_template)
                row["length"] = (
                    len(tokens(text, add_special_tokens=False).input_ids) + NEW_TOKENS[maker]
                )
            over = max(row["length"] for row in rows) - length
            if over <= 0:
                keys = ("index", "input", "outputs", "gen_prefix", "length")
                kept = [{key: row[key] for key in keys} for row in rows]
                return {"test": datasets.Dataset.from_list(kept, split=datasets.Split.TEST)}
            most -= over
    raise UserError(f"harness.lengths ({length}): RULER's task {maker} does not fit; set more")


def _frame(tokens: Any, text: str, beginning: str, chat_template: bool) -> str:
    """Returns a prompt as lm-eval writes it."""
    if not chat_template:
        return f"{text} {beginning}"
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": beginning}]
    if not beginning:
        return str(tokens.apply_chat_template(messages[:1], tokenize=False))
    return str(tokens.apply_chat_template(messages, tokenize=False, continue_final_message=True))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the generators' lines and progress bars."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def score_all(doc: RulerSample, results: list[str]) -> dict[str, float]:
    """Returns the share of the expected strings that the answer contains."""
    found = [text.lower() in results[0].lower() for text in doc["outputs"]]
    return {"score": sum(found) / len(found)}


def score_any(doc: RulerSample, results: list[str]) -> dict[str, float]:
    """Returns 1 if the answer contains one of the right answers, else 0."""
    return {"score": float(any(text.lower() in results[0].lower() for text in doc["outputs"]))}
