"""Raw sentencepiece models with a chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_longpo.data.text.chat_tokenizer import (
    ChatTokenizer,
    Message,
    spans_by_words,
    template_error,
)
from megatron_longpo.errors import UserError

SENTENCEPIECE_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}"
    "{% endfor %}"
)
"""Chat template of a raw sentencepiece model if no `chat_template` is set."""


class SentencePieceTokenizer(ChatTokenizer):
    """A sentencepiece model file. The text of a control symbol becomes its id."""

    def __init__(self, path: Path, *, chat_template: str | None = None) -> None:
        import sentencepiece

        try:
            # The contents, not the name: sentencepiece reports a bad file as OSError.
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
                # `[INST] text` of a template: the model adds this space itself.
                part = part.removeprefix(" ")
            if part:
                ids.extend(self._model.encode(part))
        return ids

    def spans(self, text: str) -> np.ndarray:
        # The joined pieces are the text, except for spaces that the model adds before a text.
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
            raise template_error(self.name, error) from error
