"""A model of `transformers` in this process; requests of one or more documents are answered
together."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from megatron_longpo.config.backends import BackendConfig
from megatron_longpo.data.text.chat import prompt_ids
from megatron_longpo.data.text.tokenizers import load_tokenizer
from megatron_longpo.errors import UserError
from megatron_longpo.generation.backends.base import BackendError, Completion, Request
from megatron_longpo.generation.backends.kv_cache import (
    ATTENTION,
    RowCache,
    forward,
    row_attention,
)
from megatron_longpo.generation.backends.rows import (
    BLOCK,
    Row,
    batches,
    capacity,
    common_length,
    shared_length,
)
from megatron_longpo.generation.backends.sampling import next_tokens
from megatron_longpo.generation.backends.together import WriteTogether

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
        self._model = _load_model(config)
        self._device = self._model.device
        model_config = self._model.config
        self._eos_ids = self._end_tokens()
        self.context_length = config.context_length or int(model_config.max_position_embeddings)
        self._batch_size = config.batch_size
        self._batch_tokens = config.batch_tokens or self._tokens_that_fit()
        self._cache = RowCache(0)
        self._kept: list[int] = []
        """Ids whose keys and values begin the cache: whole blocks."""
        self._busy = asyncio.Lock()
        like = self._check()
        self.documents_at_once = self._documents_at_once(config)
        self._together: WriteTogether | None = None
        if self.documents_at_once > 1:
            self._together = WriteTogether(
                self._model,
                eos_ids=self._eos_ids,
                like=like,
                most_documents=self.documents_at_once,
                most_tokens=self._batch_tokens,
            )

    async def complete(self, requests: Sequence[Request]) -> list[Completion | BackendError]:
        parts = self._batches([self._row(request) for request in requests])
        if self._together is not None:
            answers = await asyncio.gather(*(self._answer(part) for part in parts))
        else:
            async with self._busy:  # there is one cache
                answers = [await self._answer(part) for part in parts]
        return [answer for part in answers for answer in part]

    async def close(self) -> None:
        self._forget()
        if self._together is not None:
            self._together.forget()

    # ------------------------------------------------------------ batches

    def _row(self, request: Request) -> Row:
        generator = torch.Generator(device=self._device).manual_seed(request.seed)
        return Row(
            prompt=prompt_ids(self.tokenizer, request.messages),
            sampling=request.sampling,
            generator=generator,
            seed=request.seed,
        )

    def _batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        return batches(rows, most_rows=self._batch_size, most_tokens=self._batch_tokens)

    async def _answer(
        self, rows: list[Row], *, may_split: bool = True
    ) -> list[Completion | BackendError]:
        """Answers a batch; where GPU memory is short, in two halves."""
        try:
            if self._together is not None:
                await self._together.write(rows)
            else:
                await self._write(rows)
        except torch.OutOfMemoryError:
            self._forget()
            torch.cuda.empty_cache()
            if not may_split or len(rows) == 1:
                return [BackendError("prompt that does not fit in GPU memory") for _ in rows]
            print(
                f"warning: {len(rows)} requests of {capacity(rows):,} tokens do not fit in GPU "
                "memory together and are answered in two halves; set batch_tokens lower",
                file=sys.stderr,
            )
            for row in rows:
                row.restart()
            half = len(rows) // 2
            answers: list[Completion | BackendError] = []
            for part in (rows[:half], rows[half:]):
                answers += await self._answer(part, may_split=False)
            return answers
        return [
            Completion(
                text=self.tokenizer.decode(row.written, skip_special=True).strip(),
                finished=row.finished,
            )
            for row in rows
        ]

    # ------------------------------------------------------------ reading and writing

    async def _write(self, rows: list[Row]) -> None:
        """Fills `written` and `finished` of each row."""
        shared = shared_length(rows)
        await self._read_prefix(rows[0].prompt[:shared], capacity(rows))
        logits_NV = torch.stack(await self._read_rests(rows, shared))
        mask = _Mask(rows, shared, self._cache.capacity, like=logits_NV)
        active = list(rows)
        while active:
            tokens = next_tokens(
                logits_NV, [row.sampling for row in active], [row.generator for row in active]
            )
            for row, token in zip(active, tokens, strict=True):
                row.write(token, self._eos_ids)
            going = [index for index, row in enumerate(active) if row.is_active]
            if len(going) < len(active):
                active = [active[index] for index in going]
                mask.keep(going)
            if active:
                logits_NV = self._write_one(active, mask)
            # So that a caller's progress bar and a request to stop are not kept waiting.
            await asyncio.sleep(0)

    async def _read_prefix(self, prefix: list[int], capacity: int) -> None:
        """Makes the cache hold `prefix` and room for `capacity` tokens in all."""
        kept = min(common_length(prefix, self._kept), len(prefix)) // BLOCK * BLOCK
        if kept == 0:
            self._forget()  # before the next is allocated
        if self._cache.capacity < capacity:
            self._cache = self._cache.resized(capacity, keep=kept)
        self._cache.length = kept
        self._kept = []  # until it is whole, should this be interrupted
        await self._read(prefix[kept:], kept)
        self._kept = prefix[: len(prefix) // BLOCK * BLOCK]

    async def _read_rests(self, rows: list[Row], shared: int) -> list[torch.Tensor]:
        """Reads what each prompt has after the prefix; returns the logits [V] of its last token.

        Each is read right behind the prefix, so that no mask is needed, and moved to its place
        then. The last row goes first: its place is behind all that the others are read to.
        """
        places = [shared]
        for row in rows:
            places.append(places[-1] + len(row.prompt) - shared)
        logits: list[torch.Tensor] = []
        for row, place in reversed(list(zip(rows, places, strict=False))):
            self._cache.length = shared
            logits.append(await self._read(row.prompt[shared:], shared))
            row.start = place
            if place > shared:
                self._move(shared, len(row.prompt) - shared, place)
        self._cache.length = places[-1]
        return logits[::-1]

    async def _read(self, ids: list[int], position: int) -> torch.Tensor:
        """Reads ids behind the cache in blocks; returns the logits [V] of the last."""
        logits_V = torch.empty(0)
        for start in range(0, len(ids), BLOCK):
            block = ids[start : start + BLOCK]
            positions = list(range(position + start, position + start + len(block)))
            logits_V = self._forward(block, positions, None, num_logits=1)[0]
            await asyncio.sleep(0)
        return logits_V

    def _write_one(self, active: list[Row], mask: _Mask) -> torch.Tensor:
        """Reads the last written token of each row; returns logits [N, V]."""
        tokens = [row.written[-1] for row in active]
        positions = [len(row.prompt) + len(row.written) - 1 for row in active]
        attended = mask.with_new_tokens(self._cache.length)
        return self._forward(tokens, positions, attended, num_logits=len(tokens))

    def _forward(
        self, ids: list[int], positions: list[int], mask: torch.Tensor | None, *, num_logits: int
    ) -> torch.Tensor:
        ids_n, positions_n = torch.tensor([ids, positions], device=self._device)
        logits_NV = forward(self._model, self._cache, ids_n, positions_n, mask, logits=num_logits)
        self._cache.length += len(ids)
        return logits_NV

    @torch.inference_mode()
    def _move(self, start: int, length: int, destination: int) -> None:
        self._cache.move(start, length, destination)

    def _forget(self) -> None:
        self._cache = RowCache(0)
        self._kept = []

    # ------------------------------------------------------------ the model

    def _end_tokens(self) -> frozenset[int]:
        ends = self._model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        ids = frozenset({*ends, *self.tokenizer.eos_ids})
        if not ids:
            raise UserError(
                f"model ({self.tokenizer.name}): neither its tokenizer nor its generation config "
                "names an end-of-text token, so no answer would end; set eos_token in "
                "tokenizer_config.json"
            )
        return ids

    def _tokens_that_fit(self) -> int | None:
        if self._device.type != "cuda":
            return None
        config = self._model.config
        head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        values = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(GPU_SHARE * free / (values * self._model.dtype.itemsize))

    def _documents_at_once(self, config: BackendConfig) -> int:
        number = config.documents_at_once
        if _rope_type(self._model.config) in ("dynamic", "longrope"):
            if number is not None and number > 1:
                raise UserError(
                    f"documents_at_once ({number}): must be 1 for {self.tokenizer.name}, whose "
                    "RoPE depends on the longest text that is read at once"
                )
            return 1
        return number or (DOCUMENTS_ON_A_GPU if self._device.type == "cuda" else 1)

    def _check(self) -> RowCache:
        """Reads two tokens, so that a model whose attention is another is told before work; the
        cache that has them."""
        try:
            self._cache = RowCache(2)
            self._forward([0, 0], [0, 1], None, num_logits=1)
        except (AttributeError, NotImplementedError, TypeError) as error:
            raise UserError(
                f"model ({self.tokenizer.name}): {type(self._model).__name__} has layers that "
                f"backend: transformers does not know ({error}); serve it with vLLM, SGLang or "
                "llama.cpp, and set backend: server"
            ) from error
        cache = self._cache
        self._forget()
        return cache


class _Mask:
    """Which tokens of the cache each row attends: 0 or minus infinity, [N, capacity]."""

    def __init__(self, rows: list[Row], shared: int, capacity: int, *, like: torch.Tensor) -> None:
        self._alone = len(rows) == 1
        if self._alone:
            return
        shape = (len(rows), capacity)
        self._mask = torch.full(shape, float("-inf"), dtype=like.dtype, device=like.device)
        self._mask[:, :shared] = 0
        for index, row in enumerate(rows):
            self._mask[index, row.start : row.start + len(row.prompt) - shared] = 0

    def keep(self, indices: list[int]) -> None:
        """Leaves the rows that are not in `indices` out from now on."""
        if not self._alone:
            self._mask = self._mask[indices]

    def with_new_tokens(self, length: int) -> torch.Tensor | None:
        """[1, 1, N, length + N] where each row has one more token behind `length`."""
        if self._alone:
            return None
        end = length + len(self._mask)
        self._mask[:, length:end].fill_diagonal_(0)
        return self._mask[None, None, :, :end]


def _load_model(config: BackendConfig) -> Any:
    AttentionInterface.register(ATTENTION, row_attention)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    local = Path(config.model).expanduser()
    path = str(local) if local.is_dir() else config.model
    try:
        model_config = AutoConfig.from_pretrained(path)
        if config.rope_theta is not None:
            set_rope_theta(model_config, config.rope_theta)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=model_config,
            dtype=torch.bfloat16 if config.dtype == "bf16" else torch.float32,
            attn_implementation=ATTENTION,
        )
        return model.to(device).eval()
    except Exception as error:  # transformers raises many kinds for a folder it cannot read
        reason = " ".join(str(error).split())
        raise UserError(f"model ({config.model}): cannot be loaded ({reason[:200]})") from error


def _rope_type(model_config: Any) -> str:
    """As transformers 5 and 4 spell it; `default` where nothing is said."""
    for key in ("rope_parameters", "rope_scaling"):
        parameters = getattr(model_config, key, None)
        if isinstance(parameters, dict):
            return str(parameters.get("rope_type") or parameters.get("type") or "default")
    return "default"


def set_rope_theta(model_config: Any, theta: float) -> None:
    """Changes the RoPE base where transformers 5 (`rope_parameters`) and 4 look for it."""
    parameters = getattr(model_config, "rope_parameters", None)
    if isinstance(parameters, dict):
        parameters["rope_theta"] = theta
    else:
        model_config.rope_theta = theta
