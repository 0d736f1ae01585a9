"""Reads texts to try a model on, and compares what two tokenizers make of them."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from checkpoints_convert.hf_folder import TOKENIZER_FILES
from megatron_longpo.errors import CheckFailed, UserError
from megatron_longpo.model.architectures import Architecture

PROSE_TOPIC = "exceptions"
"""A page of Python's language reference, which comes with Python."""

ODD_TEXT = (
    "Grüße aus Köln, 東京 and Αθήνα 🙂\t1234567890  3.14e-10\n\n\n   def f(x):\r\n\treturn x\u200b"
    " <|im_start|>user <s>[INST] </s><|eot_id|><think>"
)
"""Texts that tokenizers treat specially: scripts, digits, spaces, special tokens as text."""

CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "What does the ledger say?"}],
    [
        {"role": "user", "content": "  Name the harbour.\n"},
        {"role": "assistant", "content": "It is Tønsberg.\n\nThe tide table says so."},
        {"role": "user", "content": "And the year?"},
    ],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is [INST] a word?"},
        {"role": "assistant", "content": "No."},
    ],
)


def read_texts(own: str | None) -> dict[str, str]:
    """Returns texts by name: prose and code that come with Python, and the user's own."""
    texts = {"prose": topics[PROSE_TOPIC], "code": inspect.getsource(textwrap)}
    if own is not None:
        path = Path(own).expanduser()
        try:
            texts[path.name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"text ({own}): not a readable UTF-8 file ({error})") from error
    return texts


def open_tokenizer(folder: str) -> Any | None:
    """Opens transformers' tokenizer of a folder; None if it has no such files."""
    from transformers import AutoTokenizer

    if not any(path for pattern in TOKENIZER_FILES for path in Path(folder).glob(pattern)):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds for files it cannot read
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: the tokenizer cannot be read ({reason})") from error


def token_rows(
    texts: dict[str, str], tokenizer: Any | None, arch: Architecture, *, max_tokens: int
) -> dict[str, list[int]]:
    """Returns the first tokens of each text; if there is no tokenizer, its bytes are the tokens."""
    rows: dict[str, list[int]] = {}
    longest = min(max_tokens, arch.max_position_embeddings)
    for name, text in texts.items():
        if tokenizer is None:
            ids = [byte % arch.vocab_size for byte in text.encode()]
        else:
            ids = tokenizer(text[: 20 * longest], verbose=False)["input_ids"]
        rows[name] = ids[:longest]
        if len(rows[name]) < 4:
            raise UserError(f"text {name}: {len(ids)} tokens are too few to compare logits on")
        if max(rows[name]) >= arch.vocab_size:
            raise UserError(
                f"text {name}: the tokenizer gives id {max(rows[name])}, the model has "
                f"{arch.vocab_size} embeddings; they do not belong together"
            )
    return rows


def compare_tokenizers(source: Any, export: Any | None, texts: dict[str, str]) -> str:
    """Compares ids of the texts, with and without the special tokens that a tokenizer adds."""
    if export is None:
        raise CheckFailed("the export has no tokenizer")
    num_ids = 0
    for name, text in {**texts, "odd text": ODD_TEXT}.items():
        for special in (True, False):
            expected, actual = (
                list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
                for tokenizer in (source, export)
            )
            _compare_ids(name, expected, actual)
            num_ids += len(expected)
    for attribute in ("bos_token_id", "eos_token_id", "pad_token_id"):
        expected, actual = getattr(source, attribute), getattr(export, attribute)
        if expected != actual:
            raise CheckFailed(f"{attribute} is {actual} instead of {expected}")
    return f"{len(texts) + 1} texts, {num_ids:,} ids"


def compare_chat_templates(source: Any, export: Any | None) -> str:
    """Compares ids of conversations. If one template refuses a conversation, both must."""
    num_refused = 0
    if export is None or not export.chat_template:
        raise CheckFailed("the export has no chat template")
    for number, messages in enumerate(CONVERSATIONS, start=1):
        for prompt in (False, True):
            expected, actual = (
                _conversation_ids(tokenizer, messages, prompt=prompt)
                for tokenizer in (source, export)
            )
            _compare_ids(f"conversation {number}", expected, actual)
            num_refused += expected is None
    if num_refused == 2 * len(CONVERSATIONS):
        raise CheckFailed("the source's chat template refuses every conversation")
    return f"{len(CONVERSATIONS)} conversations, as history and as prompt; {num_refused} refused"


def _conversation_ids(
    tokenizer: Any, messages: Sequence[dict[str, str]], *, prompt: bool
) -> list[int] | None:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt
        )
    except TemplateError:
        return None
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _compare_ids(name: str, expected: list[int] | None, actual: list[int] | None) -> None:
    if expected == actual:
        return
    if expected is None or actual is None:
        which = "source" if expected is None else "export"
        raise CheckFailed(f"{name}: only the {which}'s chat template refuses it")
    shared = next(
        (i for i, (one, other) in enumerate(zip(expected, actual, strict=False)) if one != other),
        min(len(expected), len(actual)),
    )
    raise CheckFailed(
        f"{name}: token {shared} is {actual[shared : shared + 1]} instead of "
        f"{expected[shared : shared + 1]}"
    )
