"""Small evaluation settings for tiny models with a byte a token, and comparison of records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_longpo.config.evaluation import (
    EvaluationConfig,
    NllConfig,
    RetentionConfig,
    RetrievalConfig,
)
from megatron_longpo.evaluation.haystack import filler_text
from tools.tiny_models import make_byte_tokenizer

RETRIEVAL = RetrievalConfig(
    kinds=("passkey", "multi_needle"), lengths=(360, 520), depths=(0.0, 0.4, 1.0), samples=2
)


def favour_digits(model_folder: str) -> None:
    """Makes a tiny model with random weights write mostly digits, of which some are right."""
    path = Path(model_folder) / "model.safetensors"
    if (path.parent / "favoured").exists():
        return
    weights = load_file(path)
    digits = make_byte_tokenizer()("123456789")["input_ids"]
    weights["lm_head.weight"][digits] *= 30
    save_file(weights, path, metadata={"format": "pt"})
    (path.parent / "favoured").touch()


def evaluation_config(folder: Path) -> EvaluationConfig:
    """All parts; writes the documents that they read to `folder`."""
    documents = folder / "held_out"
    if not documents.exists():
        documents.mkdir(parents=True)
        for seed in range(3):
            text = filler_text(seed=seed + 1)[: 700 + 100 * seed]
            (documents / f"{seed}.txt").write_text(text, encoding="utf-8")
    return EvaluationConfig(
        retrieval=RETRIEVAL,
        nll=NllConfig(documents=str(documents), length=500, bucket=120),
        retention=RetentionConfig(),
    )


def assert_same_record(
    actual: dict[str, Any], expected: dict[str, Any], *, rel: float = 1e-4
) -> None:
    """Equal words and counts, numbers within `rel`."""
    assert actual.keys() == expected.keys()
    for part, value in expected.items():
        if isinstance(value, list):
            assert len(actual[part]) == len(value)
        pairs = zip(
            actual[part] if isinstance(value, list) else [actual[part]],
            value if isinstance(value, list) else [value],
            strict=True,
        )
        for mine, theirs in pairs:
            assert mine.keys() == theirs.keys()
            for key, number in theirs.items():
                if isinstance(number, float):
                    assert mine[key] == pytest.approx(number, rel=rel, abs=1e-6), (part, key)
                else:
                    assert mine[key] == number, (part, key)
