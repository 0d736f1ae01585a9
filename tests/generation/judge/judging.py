"""A judge whose replies are looked up, and examples for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.config.judge import JudgeConfig
from megatron_longpo.data.text.examples import Example, Turn, write_examples
from megatron_longpo.data.text.hf_tokenizer import HuggingFaceTokenizer
from megatron_longpo.generation.backends.base import BackendError, Completion, Request
from megatron_longpo.generation.judge import run as judge
from tests import small_tokenizers as small


def turn(number: int, chosen: str = "It is right.", rejected: str = "It is wrong.") -> Turn:
    chunk = f"Chunk number {number} of it."
    return Turn(
        chunk=chunk,
        chunk_span=None,
        question=f"What of {number}?",
        chosen=chosen,
        rejected=rejected,
    )


def make_examples(tmp_path: Path) -> str:
    path = tmp_path / "examples.jsonl"
    write_examples(
        path,
        [
            Example(
                id=name,
                document=f"A document called {name}.",
                turns=(turn(1), turn(2, "It is poor.", "It is right.")),
                meta={"kinds": ["a", "b"], "source": name},
            )
            for name in ("one", "two", "three")
        ],
    )
    return str(path)


class Judge:
    """Likes the answer `right`, scores it 5 and others 2."""

    documents_at_once = 2

    def __init__(self, context_length: int = 2048) -> None:
        self.context_length = context_length
        self.tokenizer = HuggingFaceTokenizer(
            small.byte_level(tuple(small.CHATML_SPECIAL), "<|im_end|>"),
            name="judge",
            chat_template=small.CHATML,
        )
        self.asked: list[str] = []
        self.broken: Callable[[str], bool] = lambda text: False

    async def complete(self, requests: Sequence[Request]) -> list[Completion | BackendError]:
        return [self._reply(request.messages[-1]["content"]) for request in requests]

    def _reply(self, text: str) -> Completion | BackendError:
        self.asked.append(text)
        if self.broken(text):
            return BackendError("server that answered 500")
        if "How well" in text:
            reply = "Score: 5/5" if "Answer: It is right." in text else "2 out of 5."
        else:
            reply = "**A**" if "Answer A: It is right." in text else "The better answer is B."
        return Completion(text=reply, finished=True)

    async def close(self) -> None:
        pass


def install(monkeypatch: pytest.MonkeyPatch) -> Judge:
    made = Judge()
    monkeypatch.setattr(judge, "make_backend", lambda _: made)
    return made


def config(examples: str, **changes: Any) -> JudgeConfig:
    output = str(Path(examples).with_name("judged.jsonl"))
    return JudgeConfig(**{"model": "models/m", "examples": examples, "output": output, **changes})
