from __future__ import annotations

import pytest

from tests import small_tokenizers as small


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama of two layers with a byte-level tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("model")
    tokenizer = small.byte_level(tuple(small.CHATML_SPECIAL), "<|im_end|>")
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(small.CHATML)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.6,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)
