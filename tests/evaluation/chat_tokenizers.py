"""Small tokenizers with chat templates of several kinds; the first is ChatML's."""

from __future__ import annotations

from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer
from megatron_longpo.data.text.hf_tokenizer import HuggingFaceTokenizer
from tests.small_tokenizers import (
    CHATML,
    CHATML_SPECIAL,
    LLAMA3,
    LLAMA3_SPECIAL,
    MISTRAL_V2,
    byte_level,
    space_prefixing,
)


def tokenizers() -> list[ChatTokenizer]:
    made = [
        (byte_level(tuple(CHATML_SPECIAL), "<|im_end|>"), CHATML),
        (byte_level(tuple(LLAMA3_SPECIAL), "<|end_of_text|>", "<|begin_of_text|>"), LLAMA3),
        (space_prefixing(), MISTRAL_V2),
        # A space before the end of a turn, and two tokens that end it.
        (space_prefixing(), MISTRAL_V2.replace("{{ eos_token }}", " {{ eos_token }}")),
        (
            byte_level(tuple(CHATML_SPECIAL), "<|im_end|>"),
            CHATML.replace("<|im_end|>", "<|im_end|><|endoftext|>"),
        ),
    ]
    names = ("chatml", "llama3", "mistral", "spaced", "two ends")
    found: list[ChatTokenizer] = []
    for name, (tokenizer, template) in zip(names, made, strict=True):
        found.append(HuggingFaceTokenizer(tokenizer, name=name, chat_template=template))
    return found
