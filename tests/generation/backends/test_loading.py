"""Models that cannot be used are refused before work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.errors import UserError
from megatron_longpo.generation.backends.factory import make_backend
from tests.generation.backends.test_transformers import config


def copy_of(model: str, tmp_path: Path, **changes: dict[str, Any]) -> str:
    """A copy of the folder with keys of its JSON files changed; None removes one."""
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)
    for name, values in changes.items():
        path = folder / f"{name}.json"
        content = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return str(folder)


def test_a_model_without_an_end_token_is_refused(model: str, tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"eos_token_id": None}
    folder = copy_of(
        model,
        tmp_path,
        config=nothing,
        generation_config=nothing,
        tokenizer_config={"eos_token": None},
    )
    with pytest.raises(UserError, match=r"model \(.*\): neither its tokenizer nor .* end-of-text"):
        make_backend(config(folder))


def test_a_model_without_a_chat_template_is_refused(model: str, tmp_path: Path) -> None:
    folder = copy_of(model, tmp_path)
    (Path(folder) / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="this tokenizer has no chat template; give chat_template"):
        make_backend(config(folder))


def test_other_attention_is_refused(model: str, tmp_path: Path) -> None:
    folder = copy_of(
        model,
        tmp_path,
        config={
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "sliding_window": 64,
        },
    )
    with pytest.raises(UserError, match=r"MistralForCausalLM has layers .* set backend: server"):
        make_backend(config(folder))
