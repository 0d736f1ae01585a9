"""Tokenizers trained on a few sentences, and chat templates in the shapes of known models."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

CORPUS = [
    "The tide table of the harbour lists the high water of every day in the year.",
    "A ledger of 1843 says that twelve barrels were landed, and none of them was paid for.",
    "def measure(depth, width=4):\n    return depth * width\n",
    "What does the ledger say about the barrels? It says that none was paid for.",
    "Answer in one sentence, as the text above describes it.\n\nThe answer is: seven.",
    "[INST] user assistant system think <s> </s> <|im_start|> </think>",
]

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2, Qwen2.5: a default system prompt; a line end after the end of turn."""

QWEN3 = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Qwen3: the empty thinking of the last answer is removed from earlier ones."""

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""Llama 3: contents trimmed, the end of turn is not the end of text."""

MISTRAL_V2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %} [INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)
"""Mistral v0.2: markers are plain text, no system prompt, a space leads the answer."""

MISTRAL_V3 = (
    "{{ bos_token }}{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] "
    "{% if m == users[-1] and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] + '\n\n' }}{% endif %}{{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Mistral v0.3: markers are special tokens; the system prompt moves to the last question."""

CHATML_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


@cache
def byte_level(special: tuple[str, ...], eos: str, bos: str | None = None) -> Any:
    """A byte-level BPE, as GPT-2, Qwen, Llama 3 and SmolLM2 have; any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos)


@cache
def space_prefixing(special: tuple[str, ...] = (), *, at_start_only: bool = False) -> Any:
    """A BPE that puts a space before a text and falls back to bytes: Llama 2, Mistral.

    Mistral v0.2 puts one after every special token too; v0.3 at the very start alone.
    """
    import json

    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizer
    words = [word for line in CORPUS for word in line.split()]
    learner.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=300, show_progress=False, min_frequency=1)
    )
    learned = json.loads(learner.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *special, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [token for token in learned["vocab"] if token not in names]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: number for number, name in enumerate(names)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if at_start_only:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if special:
        wrapped.add_special_tokens({"additional_special_tokens": list(special)})
    return wrapped


@cache
def sentencepiece_model(controls: tuple[str, ...] = ()) -> bytes:
    """A sentencepiece BPE model as Llama 2 has it: identity normalisation, byte fallback.

    `controls` are further control symbols, as Mistral v0.3 has them.
    """
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.splitlines() if line),
        model_writer=written,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=list(controls),
        minloglevel=2,
    )
    return written.getvalue()
