"""A model of `transformers` in this process; requests of one or more documents are answered
together."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

import torch

from megatron_longpo.config.backends import BackendConfig
from megatron_longpo.data.text.chat import prompt_ids
from megatron_longpo.data.text.tokenizers import load_tokenizer
from megatron_longpo.errors import UserError
from megatron_longpo.generation.backends.base import BackendError, Completion, Request
from megatron_longpo.generation.backends.decoding_loop import DecodingLoop
from megatron_longpo.generation.backends.loading import (
    end_tokens,
    load_model,
    read_two_tokens,
    rope_type,
    tokens_that_fit,
)
from megatron_longpo.generation.backends.running import RunningRequest, batches, capacity

GPU_SHARE = 0.6
"""Of the GPU's memory that the model leaves, what keys and values may take together."""

DOCUMENTS_ON_A_GPU = 32
"""Unless `documents_at_once` says otherwise."""


class TransformersBackend:
    """`AutoModelForCausalLM`; what a call's prompts begin with is read once."""

    def __init__(self, config: BackendConfig) -> None:
        self.tokenizer = load_tokenizer(config.model, chat_template=config.chat_template)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        model = load_model(config)
        self._device = model.device
        self.context_length = config.context_length or int(model.config.max_position_embeddings)
        eos_ids = end_tokens(model, self.tokenizer)
        self._batch_size = config.batch_size
        self._batch_tokens = config.batch_tokens or tokens_that_fit(model, GPU_SHARE)
        like = read_two_tokens(model, self.tokenizer.name)
        self.documents_at_once = _documents_at_once(config, model, self.tokenizer.name)
        self._loop = DecodingLoop(
            model,
            eos_ids=eos_ids,
            like=like,
            most_documents=self.documents_at_once,
            most_tokens=self._batch_tokens,
        )

    async def complete(self, requests: Sequence[Request]) -> list[Completion | BackendError]:
        parts = self._batches([self._running(request) for request in requests])
        answers = await asyncio.gather(*(self._answer(part) for part in parts))
        return [answer for part in answers for answer in part]

    async def close(self) -> None:
        self._loop.forget()

    def _running(self, request: Request) -> RunningRequest:
        return RunningRequest(
            prompt=prompt_ids(self.tokenizer, request.messages),
            sampling=request.sampling,
            generator=torch.Generator(device=self._device).manual_seed(request.seed),
            seed=request.seed,
        )

    def _batches(self, requests: Sequence[RunningRequest]) -> list[list[RunningRequest]]:
        return batches(requests, most_requests=self._batch_size, most_tokens=self._batch_tokens)

    async def _answer(
        self, requests: list[RunningRequest], *, may_split: bool = True
    ) -> list[Completion | BackendError]:
        """Answers a batch; in two halves if GPU memory is short."""
        try:
            await self._loop.write(requests)
        except torch.OutOfMemoryError:
            if not may_split or len(requests) == 1:
                return [BackendError("prompt that does not fit in GPU memory") for _ in requests]
            print(
                f"warning: {len(requests)} requests of {capacity(requests):,} tokens do not fit in "
                "GPU memory together and are answered in two halves; set batch_tokens lower",
                file=sys.stderr,
            )
            half = len(requests) // 2
            answers: list[Completion | BackendError] = []
            for part in (requests[:half], requests[half:]):
                for request in part:
                    request.restart()
                answers += await self._answer(part, may_split=False)
            return answers
        return [
            Completion(
                text=self.tokenizer.decode(request.written, skip_special=True).strip(),
                finished=request.finished,
            )
            for request in requests
        ]


def _documents_at_once(config: BackendConfig, model: Any, name: str) -> int:
    number = config.documents_at_once
    if rope_type(model.config) in ("dynamic", "longrope"):
        if number is not None and number > 1:
            raise UserError(
                f"documents_at_once ({number}): must be 1 for {name}, whose "
                "RoPE depends on the longest text that is read at once"
            )
        return 1
    return number or (DOCUMENTS_ON_A_GPU if model.device.type == "cuda" else 1)
