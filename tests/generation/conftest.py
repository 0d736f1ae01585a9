from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.generation import generate
from megatron_longpo.generation.backends.base import BackendError
from tests import small_tokenizers as small
from tests.generation.scripted import DOCUMENT, Scripted


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


@pytest.fixture
def documents(tmp_path: Path) -> str:
    folder = tmp_path / "documents"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text(DOCUMENT.replace("Thing", f"Thing{name}"))
    (folder / "short.txt").write_text("Too short.")
    return str(folder)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scripted]:
    def install(answer: Callable[[str], str | BackendError], **more: Any) -> Scripted:
        backend = Scripted(answer, **more)
        monkeypatch.setattr(generate, "make_backend", lambda _: backend)
        return backend

    return install


@pytest.fixture
def many_documents(tmp_path: Path) -> str:
    """Nine documents, of which the third and the sixth give no example."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(9):
        text = DOCUMENT.replace("Thing", f"Thing{number}x")
        (folder / f"{number}.txt").write_text("Too short." * number if number in (2, 5) else text)
    (folder / "binary.txt").write_bytes(b"\0")
    return str(folder)
