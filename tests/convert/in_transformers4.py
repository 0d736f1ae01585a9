"""Under transformers 4.57, in a process of its own: reads folders, or makes one of each family.

    PYTHONPATH=.venv/transformers4 python tests/convert/in_transformers4.py read RESULT FOLDER ...
    PYTHONPATH=.venv/transformers4 python tests/convert/in_transformers4.py write FOLDER

Imports nothing of ours. RESULT is a torch file with what was read of every FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

INPUT_IDS = (5, 299, 17, 17, 42, 0, 128, 250, 3, 77, 9, 31, 200, 211, 5, 6, 7, 8, 60, 61)
MARKER = "<|marker|>"
"""A special token of one of the tokenizers."""
TEXT = f"Grüße, 東京!\n\n  x = 12 {MARKER}"
MESSAGES = [
    {"role": "user", "content": "Which year?"},
    {"role": "assistant", "content": "1843."},
    {"role": "user", "content": "And which harbour?"},
]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True},
    "mistral": {"rope_theta": 1e6, "head_dim": 12, "sliding_window": None},
    "qwen2": {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "qwen3": {"rope_theta": 1e6, "head_dim": 16},
}
"""What differs between the folders that `write` makes; all spelled as version 4 does."""


def read(folder: str) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.tensor([INPUT_IDS])).logits[0]
    return {
        "rope_theta": model.config.rope_theta,
        "rope_scaling": model.config.rope_scaling,
        "max_position_embeddings": model.config.max_position_embeddings,
        "eos_token_id": GenerationConfig.from_pretrained(folder).eos_token_id,
        "logits": logits,
        "ids": tokenizer(TEXT)["input_ids"],
        "chat": tokenizer.apply_chat_template(MESSAGES, tokenize=False),
    }


def write(folder: Path) -> dict[str, Any]:
    logits = {}
    for number, (family, settings) in enumerate(SETTINGS.items()):
        torch.manual_seed(number)
        config = AutoConfig.for_model(
            family,
            **{
                "vocab_size": 300,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
                "initializer_range": 0.2,
                **settings,
            },
        )
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / family, max_shard_size="30KB")
        with torch.no_grad():
            logits[family] = model.eval()(torch.tensor([INPUT_IDS])).logits[0]
    return logits


def main() -> None:
    assert transformers.__version__.startswith("4.57."), transformers.__version__
    action, target, *folders = sys.argv[1:]
    if action == "read":
        torch.save({folder: read(folder) for folder in folders}, target)
    else:
        torch.save(write(Path(target)), Path(target) / "logits.pt")


if __name__ == "__main__":
    main()
