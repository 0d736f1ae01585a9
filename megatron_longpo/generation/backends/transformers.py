"""A model of `transformers` in this process; a document's requests are answered together."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from megatron_longpo.data.chat import prompt_ids
from megatron_longpo.data.tokenizers import load_tokenizer
from megatron_longpo.errors import UserError
from megatron_longpo.generation.backends.base import BackendError, Completion, Request, Sampling
from megatron_longpo.generation.backends.config import BackendConfig
from megatron_longpo.generation.backends.kv_cache import ATTENTION, RowCache, row_attention
from megatron_longpo.generation.backends.sampling import next_tokens

BLOCK = 2048
"""Prompts are read in blocks of so many tokens, which bounds the memory of activations.

Keys and values of whole blocks are kept between calls. A block's are bit for bit the same whether
it was read in this call or in an earlier one, so what is kept never changes an answer."""

GPU_SHARE = 0.5
"""Of the GPU's memory that keys and values may take together."""


@dataclass(kw_only=True, slots=True)
class _Row:
    """A request under way."""

    prompt: list[int]
    sampling: Sampling
    generator: torch.Generator
    start: int = 0
    """Where the row's own part of the prompt stands in the cache."""
    written: list[int] = field(default_factory=list)
    finished: bool = False

    @property
    def most_tokens(self) -> int:
        return len(self.prompt) + self.sampling.max_new_tokens


class TransformersBackend:
    """`AutoModelForCausalLM`; what a call's prompts begin with is read once."""

    documents_at_once = 1

    def __init__(self, config: BackendConfig) -> None:
        self.tokenizer = load_tokenizer(config.model, chat_template=config.chat_template)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._model = _load_model(config)
        self._device = self._model.device
        model_config = self._model.config
        self._eos_ids = self._end_tokens()
        self.context_length = config.context_length or int(model_config.max_position_embeddings)
        self._group = model_config.num_attention_heads // model_config.num_key_value_heads
        self._batch_size = config.batch_size
        self._batch_tokens = config.batch_tokens or self._tokens_that_fit()
        self._cache = RowCache(0)
        self._kept: list[int] = []
        """Ids whose keys and values begin the cache: whole blocks."""
        self._busy = asyncio.Lock()
        self._check()

    async def complete(self, requests: Sequence[Request]) -> list[Completion | BackendError]:
        async with self._busy:  # there is one cache
            rows = [self._row(request) for request in requests]
            answers: list[Completion | BackendError] = []
            for batch in self._batches(rows):
                answers += await self._answer(batch)
            return answers

    async def close(self) -> None:
        self._forget()

    # ------------------------------------------------------------ batches

    def _row(self, request: Request) -> _Row:
        generator = torch.Generator(device=self._device).manual_seed(request.seed)
        return _Row(
            prompt=prompt_ids(self.tokenizer, request.messages),
            sampling=request.sampling,
            generator=generator,
        )

    def _batches(self, rows: Sequence[_Row]) -> list[list[_Row]]:
        """Consecutive rows within both bounds; a row over them is alone."""
        batches: list[list[_Row]] = []
        for row in rows:
            if (
                batches
                and len(batches[-1]) < self._batch_size
                and _capacity([*batches[-1], row]) <= (self._batch_tokens or sys.maxsize)
            ):
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches

    async def _answer(
        self, rows: list[_Row], *, may_split: bool = True
    ) -> list[Completion | BackendError]:
        """Answers a batch; where GPU memory is short, in two halves."""
        try:
            await self._write(rows)
        except torch.OutOfMemoryError:
            self._forget()
            torch.cuda.empty_cache()
            if not may_split or len(rows) == 1:
                return [BackendError("prompt that does not fit in GPU memory") for _ in rows]
            print(
                f"warning: {len(rows)} requests of {_capacity(rows):,} tokens do not fit in GPU "
                "memory together and are answered in two halves; set batch_tokens lower",
                file=sys.stderr,
            )
            for row in rows:
                row.written.clear()
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

    async def _write(self, rows: list[_Row]) -> None:
        """Fills `written` and `finished` of each row."""
        shared = _shared_length(rows)
        await self._read_prefix(rows[0].prompt[:shared], _capacity(rows))
        logits_NV = torch.stack(await self._read_rests(rows, shared))
        mask = _Mask(rows, shared, self._cache.capacity, self._group, like=logits_NV)
        active = list(rows)
        while active:
            tokens = next_tokens(
                logits_NV, [row.sampling for row in active], [row.generator for row in active]
            )
            for row, token in zip(active, tokens, strict=True):
                row.written.append(token)
                row.finished = token in self._eos_ids
            going = [
                index
                for index, row in enumerate(active)
                if not row.finished and len(row.written) < row.sampling.max_new_tokens
            ]
            if len(going) < len(active):
                active = [active[index] for index in going]
                mask.keep(going)
            if active:
                logits_NV = self._write_one(active, mask)
            # So that a caller's progress bar and a request to stop are not kept waiting.
            await asyncio.sleep(0)

    async def _read_prefix(self, prefix: list[int], capacity: int) -> None:
        """Makes the cache hold `prefix` and room for `capacity` tokens in all."""
        kept = min(_common_length(prefix, self._kept), len(prefix)) // BLOCK * BLOCK
        if kept == 0:
            self._forget()  # before the next is allocated
        if self._cache.capacity < capacity:
            self._cache = self._cache.resized(capacity, keep=kept)
        self._cache.length = kept
        self._kept = []  # until it is whole, should this be interrupted
        await self._read(prefix[kept:], kept)
        self._kept = prefix[: len(prefix) // BLOCK * BLOCK]

    async def _read_rests(self, rows: list[_Row], shared: int) -> list[torch.Tensor]:
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

    def _write_one(self, active: list[_Row], mask: _Mask) -> torch.Tensor:
        """Reads the last written token of each row; returns logits [N, V]."""
        tokens = [row.written[-1] for row in active]
        positions = [len(row.prompt) + len(row.written) - 1 for row in active]
        attended = mask.with_new_tokens(self._cache.length)
        return self._forward(tokens, positions, attended, num_logits=len(tokens))

    @torch.inference_mode()
    def _forward(
        self, ids: list[int], positions: list[int], mask: torch.Tensor | None, *, num_logits: int
    ) -> torch.Tensor:
        output = self._model(
            input_ids=torch.tensor([ids], device=self._device),
            position_ids=torch.tensor([positions], device=self._device),
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=num_logits,
        )
        self._cache.length += len(ids)
        logits_NV: torch.Tensor = output.logits[0]
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
        memory = torch.cuda.get_device_properties(self._device).total_memory
        return int(GPU_SHARE * memory / (values * self._model.dtype.itemsize))

    def _check(self) -> None:
        """Reads two tokens, so that a model whose attention is another is told before work."""
        try:
            self._cache = RowCache(2)
            self._forward([0, 0], [0, 1], None, num_logits=1)
        except (AttributeError, NotImplementedError, TypeError) as error:
            raise UserError(
                f"model ({self.tokenizer.name}): {type(self._model).__name__} has layers that "
                f"backend: transformers does not know ({error}); serve it with vLLM, SGLang or "
                "llama.cpp, and set backend: server"
            ) from error
        self._forget()


class _Mask:
    """Which tokens of the cache each row attends: 0 or minus infinity, [G, N, capacity]."""

    def __init__(
        self, rows: list[_Row], shared: int, capacity: int, group: int, *, like: torch.Tensor
    ) -> None:
        self._alone = len(rows) == 1
        if self._alone:
            return
        shape = (group, len(rows), capacity)
        self._mask = torch.full(shape, float("-inf"), dtype=like.dtype, device=like.device)
        self._mask[:, :, :shared] = 0
        for index, row in enumerate(rows):
            self._mask[:, index, row.start : row.start + len(row.prompt) - shared] = 0

    def keep(self, indices: list[int]) -> None:
        """Leaves the rows that are not in `indices` out from now on."""
        if not self._alone:
            self._mask = self._mask[:, indices]

    def with_new_tokens(self, length: int) -> torch.Tensor | None:
        """[1, 1, G * N, length + N] where each row has one more token behind `length`."""
        if self._alone:
            return None
        group, num_rows, _ = self._mask.shape
        self._mask[:, :, length : length + num_rows].diagonal(dim1=1, dim2=2).zero_()
        return self._mask[:, :, : length + num_rows].reshape(1, 1, group * num_rows, -1)


def _shared_length(rows: list[_Row]) -> int:
    """How many tokens all prompts begin with, less at least one of each that is still to be read.

    Less than a block is not worth it: the few tokens of a template's opening.
    """
    first = rows[0].prompt
    length = min(_common_length(first, row.prompt) for row in rows)
    length = min(length, min(len(row.prompt) for row in rows) - 1)
    return length if length >= BLOCK or len(rows) == 1 else 0


def _common_length(left: list[int], right: list[int]) -> int:
    longest = min(len(left), len(right))
    if left[:longest] == right[:longest]:
        return longest
    return next(i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)


def _capacity(rows: list[_Row]) -> int:
    """Tokens that the cache must hold for these rows."""
    shared = _shared_length(rows)
    return shared + sum(row.most_tokens - shared for row in rows)


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


def set_rope_theta(model_config: Any, theta: float) -> None:
    """Changes the RoPE base where transformers 5 (`rope_parameters`) and 4 look for it."""
    parameters = getattr(model_config, "rope_parameters", None)
    if isinstance(parameters, dict):
        parameters["rope_theta"] = theta
    else:
        model_config.rope_theta = theta
