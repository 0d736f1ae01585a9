"""Hugging Face tokenizers with a chat template, fast and slow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_longpo.data.text.chat_tokenizer import (
    ChatTokenizer,
    Message,
    spans_by_words,
    template_error,
)
from megatron_longpo.errors import UserError

_STILL_CLOCK = (
    "{% macro strftime_now(format) -%}"
    "{{ format | replace('%d', '26') | replace('%m', '07') | replace('%b', 'Jul')"
    " | replace('%B', 'July') | replace('%Y', '2024') }}"
    "{%- endmacro %}"
)
"""Put before a template that asks for the date (Llama 3.2), so that rows do not depend on the day:
always the date that Llama's templates use if there is no clock."""


class HuggingFaceTokenizer(ChatTokenizer):
    """A `transformers` tokenizer, fast or slow."""

    def __init__(self, tokenizer: Any, *, name: str, chat_template: str | None = None) -> None:
        try:
            template = str(tokenizer.get_chat_template(chat_template))
        except ValueError:  # there is no template, or several without a default
            raise UserError(
                f"{name}: this tokenizer has no chat template; "
                "give chat_template: the path of a Jinja file"
            ) from None
        if "strftime_now" in template:
            template = _STILL_CLOCK + template
        self._tokenizer = tokenizer
        self._chat_template = template
        # The Rust tokenizer itself: `transformers` would also compute offsets and masks.
        self._fast: Any = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if self._fast is not None:
            self._fast.no_truncation()
            self._fast.no_padding()
        self.name = name
        self.vocab_size = len(tokenizer)
        self.eos_ids = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        added = tokenizer.added_tokens_decoder.values()
        # Other added tokens are words: some tokenizers have runs of spaces among them.
        texts = {
            token.content
            for token in added
            if token.special or (token.content.strip() and token.content in template)
        }
        texts |= set(tokenizer.all_special_tokens)
        self.special_texts = tuple(sorted(texts))

    def _encode(self, text: str) -> list[int]:
        if self._fast is None:
            return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return list(self._fast.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def token_starts(self, text: str) -> np.ndarray | None:
        if self._fast is None:
            return None
        offsets = self._fast.encode(text, add_special_tokens=False).offsets
        return np.array([start for start, _ in offsets], dtype=np.int64)

    def spans(self, text: str) -> np.ndarray:
        if not self._tokenizer.is_fast:
            return spans_by_words(text, lambda word: len(self.encode(word)))
        encoding = self._tokenizer(
            text, add_special_tokens=False, verbose=False, return_offsets_mapping=True
        )
        return np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = False) -> str:
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )
        return str(text)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=self._chat_template,
                # Templates of models that can think aloud (Qwen3) then ask for the plain answer.
                enable_thinking=False,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise template_error(self.name, error) from error
        return str(text)
