"""Tiny models of every architecture that is supported: settings of `make_tiny_model`."""

from __future__ import annotations

from typing import Any

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # So short that the rows of a test are longer than it.
    "original_max_position_embeddings": 16,
}

YARN_ROPE = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 8.0,
    "truncate": False,
}

MODELS: dict[str, dict[str, Any]] = {
    "llama 2": {"family": "llama", "kv_heads": 4},
    "llama 3.1": {"family": "llama", "rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0},
    "llama 3.2": {"family": "llama", "rope_scaling": LLAMA3_ROPE, "tied": True},
    "mistral": {"family": "mistral"},
    # 8 heads of 6 where the hidden size has room for 8 heads of 4.
    "mistral nemo": {"family": "mistral", "heads": 8, "head_dim": 6, "rope_theta": 1e6},
    "qwen2 tied": {"family": "qwen2", "tied": True},
    "qwen2 untied": {"family": "qwen2"},
    "qwen2 linear rope": {
        "family": "qwen2",
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "qwen2 yarn rope": {"family": "qwen2", "rope_scaling": YARN_ROPE},
    "qwen3 tied": {"family": "qwen3", "tied": True, "head_dim": 16},
    "qwen3 untied": {"family": "qwen3", "head_dim": 16},
}
