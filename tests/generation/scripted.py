"""A backend whose answers are looked up, documents for it, and settings that suit them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_longpo.config.generate import GenerateConfig
from megatron_longpo.data.text.chat import prompt_ids
from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer
from megatron_longpo.data.text.hf_tokenizer import HuggingFaceTokenizer
from megatron_longpo.generation import generate
from megatron_longpo.generation.backends.base import BackendError, Completion, Request, Sampling
from tests import small_tokenizers as small

PARTS = [
    f"class Thing{number}(Base{number}):\n    '''Part {number} of the document.'''\n"
    for number in range(12)
]
DOCUMENT = "\n\n".join(PARTS)


def settings(model: str, documents: str, tmp_path: Path, **changes: Any) -> GenerateConfig:
    values: dict[str, Any] = {
        "instructions": "template",
        "chunk_min_tokens": 60,
        "chunk_max_tokens": 150,
        "turns": 2,
        "max_new_tokens": 12,
        "dtype": "fp32",
        "num_threads": 1,
        "output": str(tmp_path / "examples.jsonl"),
        "report": False,
        **changes,
    }
    return GenerateConfig(model=model, documents=documents, **values)


class Scripted:
    """A backend whose answers are looked up; it records what it was asked."""

    context_length = 2048

    def __init__(
        self,
        answer: Callable[[str], str | BackendError],
        *,
        finished: bool = True,
        documents_at_once: int = 1,
    ) -> None:
        self.tokenizer: ChatTokenizer = HuggingFaceTokenizer(
            small.byte_level(tuple(small.CHATML_SPECIAL), "<|im_end|>"),
            name="scripted",
            chat_template=small.CHATML,
        )
        self.answer, self.finished = answer, finished
        self.documents_at_once = documents_at_once
        self.batches: list[int] = []
        self.under_way = self.most_under_way = 0
        self.prompts: list[str] = []
        self.samplings: list[Sampling] = []
        self.seeds: list[int] = []

    async def complete(self, requests: Sequence[Request]) -> list[Completion | BackendError]:
        self.batches.append(len(requests))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        # The later begun, the sooner done: documents overtake each other.
        for _ in range(20 // self.under_way if self.documents_at_once > 1 else 0):
            await asyncio.sleep(0)
        self.under_way -= 1
        return [self._complete(request) for request in requests]

    def _complete(self, request: Request) -> Completion | BackendError:
        text = self.tokenizer.decode(prompt_ids(self.tokenizer, request.messages))
        self.prompts.append(text)
        self.samplings.append(request.sampling)
        self.seeds.append(request.seed)
        answer = self.answer(text)
        if isinstance(answer, BackendError):
            return answer
        return Completion(text=answer, finished=self.finished)

    async def close(self) -> None:
        pass


Install = Callable[..., Scripted]
"""The fixture `scripted`: makes a backend and puts it in place."""


def is_long(prompt: str) -> bool:
    return all(f"Base{number}" in prompt for number in (0, 11))


def by_length(prompt: str) -> str:
    return "A long and wrong answer." if is_long(prompt) else "A short and right answer."


def whole_file(documents: str, tmp_path: Path, scripted: Install) -> bytes:
    """The examples file of one uninterrupted process."""
    scripted(by_length)
    config = settings("m", documents, tmp_path, output=str(tmp_path / "whole.jsonl"))
    generate.run_generate(config)
    return (tmp_path / "whole.jsonl").read_bytes()
