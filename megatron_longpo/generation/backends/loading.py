"""Loading a transformers model that writes, and what its config and tokenizer say about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from megatron_longpo.config.backends import BackendConfig
from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer
from megatron_longpo.errors import UserError
from megatron_longpo.generation.backends.attention import ATTENTION, cached_attention
from megatron_longpo.generation.backends.kv_cache import PromptCache, forward


def load_model(config: BackendConfig) -> Any:
    """Loads the model of a config, with attention over our caches.

    Raises:
        UserError: the folder or hub id cannot be read.
    """
    AttentionInterface.register(ATTENTION, cached_attention)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    local = Path(config.model).expanduser()
    path = str(local) if local.is_dir() else config.model
    try:
        model_config = AutoConfig.from_pretrained(path)
        if config.rope_theta is not None:
            set_rope_theta(model_config, config.rope_theta)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=model_config,
            dtype=torch.bfloat16 if config.dtype == "bf16" else torch.float32,
            attn_implementation=ATTENTION,
        )
        return model.to(device).eval()
    except Exception as error:  # transformers raises many kinds for a folder it cannot read
        reason = " ".join(str(error).split())
        raise UserError(f"model ({config.model}): cannot be loaded ({reason[:200]})") from error


def read_two_tokens(model: Any, name: str) -> PromptCache:
    """Reads two tokens; returns the cache that holds their keys and values.

    Raises:
        UserError: the model has attention that our caches cannot serve.
    """
    cache = PromptCache(2)
    ids_n, positions_n = torch.tensor([[0, 0], [0, 1]], device=model.device)
    try:
        forward(model, cache, ids_n, positions_n, None, logits=1)
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise UserError(
            f"model ({name}): {type(model).__name__} has layers that backend: transformers does "
            f"not know ({error}); serve it with vLLM, SGLang or llama.cpp, and set backend: server"
        ) from error
    return cache


def end_tokens(model: Any, tokenizer: ChatTokenizer) -> frozenset[int]:
    """Returns the ids that end an answer, of the model and of its tokenizer.

    Raises:
        UserError: there are none.
    """
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    ids = frozenset({*ends, *tokenizer.eos_ids})
    if not ids:
        raise UserError(
            f"model ({tokenizer.name}): neither its tokenizer nor its generation config "
            "names an end-of-text token, so no answer would end; set eos_token in "
            "tokenizer_config.json"
        )
    return ids


def tokens_that_fit(model: Any, share: float) -> int | None:
    """Returns how many tokens' keys and values fit into a share of the free GPU memory; None on a
    CPU."""
    if model.device.type != "cuda":
        return None
    config = model.config
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    free, _ = torch.cuda.mem_get_info(model.device)
    return int(share * free / (values * model.dtype.itemsize))


def rope_type(model_config: Any) -> str:
    """Returns the kind of RoPE as transformers 5 and 4 spell it; `default` if none is given."""
    for key in ("rope_parameters", "rope_scaling"):
        parameters = getattr(model_config, key, None)
        if isinstance(parameters, dict):
            return str(parameters.get("rope_type") or parameters.get("type") or "default")
    return "default"


def set_rope_theta(model_config: Any, theta: float) -> None:
    """Changes the RoPE base where transformers 5 (`rope_parameters`) and 4 look for it."""
    parameters = getattr(model_config, "rope_parameters", None)
    if isinstance(parameters, dict):
        parameters["rope_theta"] = theta
    else:
        model_config.rope_theta = theta
