"""Loads a tokenizer by its path or hub id."""

from __future__ import annotations

from pathlib import Path

from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer
from megatron_longpo.data.text.hf_tokenizer import HuggingFaceTokenizer
from megatron_longpo.data.text.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_longpo.errors import UserError


def load_tokenizer(path: str, *, chat_template: str | None = None) -> ChatTokenizer:
    """Loads a Hugging Face folder or hub id, or a sentencepiece model file.

    `chat_template` is the path of a Jinja file that replaces the tokenizer's own template. A
    sentencepiece file has no template; without this argument it gets `SENTENCEPIECE_TEMPLATE`.
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
