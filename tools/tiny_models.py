"""Makes a Hugging Face folder of a tiny model with random weights and a byte tokenizer.

    python tools/tiny_models.py qwen3 /tmp/tiny-qwen3 --tied --layers 2

For tests and for trying commands without a download: every text can be tokenised, nothing it
writes means anything. Norms and biases are random too, so that a mix-up of tensors shows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from megatron_longpo.model import architectures

FAMILIES = tuple(family.name for family in architectures.FAMILIES.values())
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_model(
    family: str,
    folder: str | Path,
    *,
    seed: int = 0,
    tied: bool = False,
    vocab_size: int = 300,
    layers: int = 2,
    hidden: int = 32,
    ffn: int = 48,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    max_positions: int = 4096,
    rope_theta: float = 10000.0,
    rope_scaling: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    tokenizer: bool = True,
) -> str:
    """Writes config, weights, generation config and tokenizer to `folder` and returns its path."""
    if family not in FAMILIES:
        raise ValueError(f"family ({family}) must be one of {', '.join(FAMILIES)}")
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim or hidden // heads,
        "max_position_embeddings": max_positions,
        "rope_parameters": {
            "rope_type": "default",
            **(rope_scaling or {}),
            "rope_theta": rope_theta,
        },
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    if any(f.name == family and f.sliding_window for f in architectures.FAMILIES.values()):
        settings["sliding_window"] = None
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.1 * noise)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        make_byte_tokenizer(vocab_size).save_pretrained(folder)
    return str(folder)


def make_byte_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Returns a tokenizer: a token a byte, three special ones, ChatML, EOS as padding."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size ({vocab_size}) must be at least {SMALLEST_VOCABULARY}")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tied", action="store_true", help="share embedding and output weights")
    parser.add_argument("--vocab_size", type=int, default=300)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--ffn", type=int, default=48)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv_heads", type=int, default=2)
    parser.add_argument("--head_dim", type=int, help="default: hidden / heads")
    parser.add_argument("--max_positions", type=int, default=4096)
    parser.add_argument("--rope_theta", type=float, default=10000.0)
    arguments = vars(parser.parse_args())
    print(make_tiny_model(arguments.pop("family"), arguments.pop("folder"), **arguments))


if __name__ == "__main__":
    main()
