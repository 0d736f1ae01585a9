"""What writes the answers: a model in `transformers`, one prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.data.chat import prompt_ids
from megatron_longpo.data.rows import common_prefix_length
from megatron_longpo.data.tokenizers import load_tokenizer
from megatron_longpo.errors import UserError
from megatron_longpo.generation.backends.base import BackendError, Completion, Request, Sampling
from megatron_longpo.generation.backends.config import BackendConfig


class TransformersBackend:
    """`AutoModelForCausalLM`; a prompt that begins like the last one reuses its keys and values."""

    documents_at_once = 1

    def __init__(self, config: BackendConfig) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        path, device = config.model, config.device
        self.tokenizer = load_tokenizer(path, chat_template=config.chat_template)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        local = Path(path).expanduser()
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(local) if local.is_dir() else path,
                dtype=torch.bfloat16 if config.dtype == "bf16" else torch.float32,
            )
            self._model = model.to(device).eval()
        except Exception as error:  # transformers raises many kinds for a folder it cannot read
            reason = " ".join(str(error).split())
            raise UserError(f"model ({path}): cannot be loaded ({reason[:200]})") from error
        ends = self._model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self._eos_ids = sorted({*ends, *self.tokenizer.eos_ids})
        # A folder's own defaults (repetition penalty, top-k) would change answers unasked.
        self._model.generation_config = GenerationConfig()
        self.context_length = config.context_length or int(
            self._model.config.max_position_embeddings
        )

    async def complete(self, requests: Sequence[Request]) -> list[Completion | BackendError]:
        self._cache: Any = None
        self._cached_ids: list[int] = []
        return [
            self._complete(
                prompt_ids(self.tokenizer, request.messages), request.sampling, seed=request.seed
            )
            for request in requests
        ]

    async def close(self) -> None:
        self._cache = None

    def _complete(self, prompt: list[int], sampling: Sampling, *, seed: int) -> Completion:
        import torch
        from transformers import DynamicCache, GenerationConfig

        greedy = sampling.temperature == 0
        settings = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=not greedy,
            temperature=None if greedy else sampling.temperature,
            top_p=None if greedy else sampling.top_p,
            top_k=None if greedy else 0,
            eos_token_id=self._eos_ids or None,
            pad_token_id=self._eos_ids[0] if self._eos_ids else 0,
        )
        shared = common_prefix_length(np.array(prompt[:-1]), np.array(self._cached_ids))
        if self._cache is None or shared == 0:
            self._cache = DynamicCache(config=self._model.config)
        elif shared < len(self._cached_ids):
            self._cache.crop(shared - len(self._cached_ids))  # negative: so many off the end
        input_ids = torch.tensor([prompt], device=self._model.device)
        torch.manual_seed(seed)
        with torch.inference_mode():
            output = self._model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                past_key_values=self._cache,
                generation_config=settings,
            )
        written = output[0, len(prompt) :].tolist()
        # The last token was written but never read: its keys are not in the cache.
        self._cached_ids = [*prompt, *written][: self._cache.get_seq_length()]
        finished = bool(written) and written[-1] in self._eos_ids
        text = self.tokenizer.decode(written, skip_special=True).strip()
        return Completion(text=text, finished=finished)
