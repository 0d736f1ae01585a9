"""Tokenizers that know a chat template: Hugging Face folders and raw sentencepiece models."""

from __future__ import annotations

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.errors import UserError

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`."""

SENTENCEPIECE_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}"
    "{% endfor %}"
)
"""Chat template of a raw sentencepiece model where no `chat_template` is set."""

_STILL_CLOCK = (
    "{% macro strftime_now(format) -%}"
    "{{ format | replace('%d', '26') | replace('%m', '07') | replace('%b', 'Jul')"
    " | replace('%B', 'July') | replace('%Y', '2024') }}"
    "{%- endmacro %}"
)
"""Goes before a template that asks for the date (Llama 3.2), which would give other tokens tomorrow
than today: on every day it is the one that Llama's templates have where there is no clock."""

_NUM_REMEMBERED = 32
"""Texts whose ids are remembered: more than the prompts and answers of one example, which come
again in its other rows."""


class ChatTokenizer(ABC):
    """What rows and generation need of a tokenizer; the text of special tokens is read as such."""

    name: str
    """The path or hub id it came from, for messages."""
    vocab_size: int
    eos_ids: tuple[int, ...]
    """Ids that end a turn or a text."""
    special_texts: tuple[str, ...]
    """Texts that `encode` turns into one token, wherever they stand, and that are no one's words:
    special tokens, and further markup of the chat template such as Qwen3's `<think>`."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with nothing put before or after it."""
        return self.ids(text).tolist()

    def ids(self, text: str) -> np.ndarray:
        """[S] int64, read-only: the same, remembered for a while."""
        return self._remembered_ids(text)

    @cached_property
    def _remembered_ids(self) -> Callable[[str], np.ndarray]:
        def encode(text: str) -> np.ndarray:
            ids = np.array(self._encode(text), dtype=np.int64)
            ids.flags.writeable = False
            return ids

        return lru_cache(maxsize=_NUM_REMEMBERED)(encode)

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    def token_starts(self, text: str) -> np.ndarray | None:
        """[S] int64: the character of `text` where each of its tokens begins; None where the
        tokenizer does not tell."""
        return None

    @abstractmethod
    def spans(self, text: str) -> np.ndarray:
        """Characters [start, end) that each token of `encode(text)` stands for, [num_tokens, 2]."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = False) -> str:
        """The text of `ids`, spaces as they are."""

    @abstractmethod
    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text, by the chat template."""


class HuggingFaceTokenizer(ChatTokenizer):
    """A `transformers` tokenizer, fast or slow."""

    def __init__(self, tokenizer: Any, *, name: str, chat_template: str | None = None) -> None:
        try:
            template = str(tokenizer.get_chat_template(chat_template))
        except ValueError:  # there is none, or several and none is the default
            raise UserError(
                f"{name}: this tokenizer has no chat template; "
                "give chat_template: the path of a Jinja file"
            ) from None
        if "strftime_now" in template:
            template = _STILL_CLOCK + template
        self._tokenizer = tokenizer
        self._chat_template = template
        # The Rust tokenizer by itself: `transformers` would keep offsets and masks as well.
        self._fast: Any = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if self._fast is not None:
            self._fast.no_truncation()
            self._fast.no_padding()
        self.name = name
        self.vocab_size = len(tokenizer)
        self.eos_ids = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        added = tokenizer.added_tokens_decoder.values()
        # Added tokens that are neither are words: some tokenizers have runs of spaces among them.
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
            raise _template_error(self.name, error) from error
        return str(text)


class SentencePieceTokenizer(ChatTokenizer):
    """A bare sentencepiece model file; control symbols written in a text become their ids."""

    def __init__(self, path: Path, *, chat_template: str | None = None) -> None:
        import sentencepiece

        try:
            # The file by itself, not its name: sentencepiece reports a bad file as OSError.
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: not a sentencepiece model ({error})") from error
        model = self._model
        self.name = str(path)
        self.vocab_size = int(model.vocab_size())
        self.eos_ids = (model.eos_id(),) if model.eos_id() >= 0 else ()
        self._control_ids = {
            model.id_to_piece(i): i for i in range(self.vocab_size) if model.is_control(i)
        }
        self.special_texts = tuple(sorted(self._control_ids))
        self._controls = re.compile(
            "(" + "|".join(re.escape(text) for text in self.special_texts) + ")"
        )
        self._chat_template = chat_template or SENTENCEPIECE_TEMPLATE
        self._adds_space = model.encode_as_pieces("a")[0].startswith("\u2581")

    def _encode(self, text: str) -> list[int]:
        if not self._control_ids:
            return list(self._model.encode(text))
        ids: list[int] = []
        for part in self._controls.split(text):
            if part in self._control_ids:
                ids.append(self._control_ids[part])
                continue
            if ids and self._adds_space:
                # `[INST] text` of a template: its space is the one that the model puts there.
                part = part.removeprefix(" ")
            if part:
                ids.extend(self._model.encode(part))
        return ids

    def spans(self, text: str) -> np.ndarray:
        # The pieces joined are the text, but for spaces that the model puts before a text.
        data = text.encode()
        edges: list[tuple[int, int]] = []
        position = 0
        for token in self.encode(text):
            piece = self._model.id_to_piece(token)
            if self._model.is_byte(token):
                surface = bytes([int(piece[3:5], 16)])
            else:
                surface = piece.replace("\u2581", " ").encode()
            if not data.startswith(surface, position):
                if data.startswith(b" " + surface, position):
                    position += 1  # the space after a control symbol, which `encode` leaves out
                surface = (
                    surface if data.startswith(surface, position) else surface.removeprefix(b" ")
                )
            if not data.startswith(surface, position):  # the model rewrites what it reads
                return spans_by_words(text, lambda word: len(self.encode(word)))
            edges.append((position, position + len(surface)))
            position += len(surface)
        is_first_byte = (np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80
        num_chars = np.concatenate([[0], np.cumsum(is_first_byte)])
        starts, ends = np.array(edges, dtype=np.int64).reshape(-1, 2).T
        # A byte within a character begins where the character does.
        begun = np.append(is_first_byte, True)[starts]
        return np.stack([num_chars[starts] - ~begun, num_chars[ends]], axis=1)

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = False) -> str:
        parts: list[str] = []
        plain: list[int] = []
        for token in [int(token) for token in ids]:
            if self._model.is_control(token):
                parts.append(self._model.decode(plain))
                plain = []
                if not skip_special:
                    parts.append(self._model.id_to_piece(token))
            else:
                plain.append(token)
        return "".join([*parts, self._model.decode(plain)])

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        model = self._model
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        try:
            return environment.from_string(self._chat_template).render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=model.id_to_piece(model.bos_id()) if model.bos_id() >= 0 else "",
                eos_token=model.id_to_piece(model.eos_id()) if model.eos_id() >= 0 else "",
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise _template_error(self.name, error) from error


_WORD = re.compile(r"\s?\S{1,40}|\s+?")


def spans_by_words(text: str, count_tokens: Callable[[str], int]) -> np.ndarray:
    """Spans for a tokenizer that does not tell them: of words, shared out among their tokens.

    [num_tokens, 2]. A word by itself may have a token more than within a text.
    """
    spans: list[tuple[int, int]] = []
    counts: dict[str, int] = {}
    for found in _WORD.finditer(text):
        word, start = found[0], found.start()
        if word not in counts:
            counts[word] = count_tokens(word)
        edges = np.linspace(start, found.end(), counts[word] + 1).round().astype(int).tolist()
        spans += itertools.pairwise(edges)
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def load_tokenizer(path: str, *, chat_template: str | None = None) -> ChatTokenizer:
    """Loads a Hugging Face folder or hub id, or a sentencepiece model file.

    `chat_template` is the path of a Jinja file to use in place of the tokenizer's own template.
    A sentencepiece file has no template of its own; without the setting it gets
    `SENTENCEPIECE_TEMPLATE`.
    """
    template = None if chat_template is None else _read_template(chat_template)
    local = Path(path).expanduser()
    if local.is_file():
        return SentencePieceTokenizer(local, chat_template=template)

    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(local) if local.is_dir() else path)
    except Exception as error:  # transformers raises many kinds for a folder it cannot read
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: no tokenizer found there ({reason[:200]}); give a Hugging Face folder, "
            "a hub id or a sentencepiece model file"
        ) from error
    return HuggingFaceTokenizer(tokenizer, name=path, chat_template=template)


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template ({path}): cannot be read ({error})") from error


def _template_error(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(
        f"{name}: its chat template refuses this conversation ({reason}); "
        "set another with chat_template, or leave out the system prompt"
    )
