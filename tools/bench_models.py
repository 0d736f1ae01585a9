"""What the benchmarks train: model shapes, random weights, and a pair of LongPO's shape."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator

from megatron_longpo.data.rows.schema import IGNORED_LABEL, PreferenceRow, TokenRow
from megatron_longpo.model.architectures import Architecture


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The sizes of config.json that decide what a step costs."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    class_name: str = "LlamaForCausalLM"
    tied: bool = False

    def write_config(self, folder: Path, *, max_positions: int) -> None:
        """Writes a folder that has config.json alone: weights are made where the model is."""
        folder.mkdir(parents=True)
        config = {
            "architectures": [self.class_name],
            "model_type": self.class_name.removesuffix("ForCausalLM").lower(),
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": max_positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "sliding_window": None,
        }
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    def changed(self, **sizes: int | None) -> ModelShape:
        """Returns the shape with those of `sizes` that are not None."""
        given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
        return replace(self, **given)


SHAPES = {
    "small": ModelShape(layers=4, hidden=256, ffn=704, heads=4, kv_heads=4, vocabulary=1024),
    "smollm2-135m": ModelShape(
        layers=30, hidden=576, ffn=1536, heads=9, kv_heads=3, vocabulary=49152, tied=True
    ),
    "qwen2.5-1.5b": ModelShape(
        layers=28,
        hidden=1536,
        ffn=8960,
        heads=12,
        kv_heads=2,
        vocabulary=151936,
        class_name="Qwen2ForCausalLM",
        tied=True,
    ),
    "qwen2.5-7b": ModelShape(
        layers=28,
        hidden=3584,
        ffn=18944,
        heads=28,
        kv_heads=4,
        vocabulary=152064,
        class_name="Qwen2ForCausalLM",
    ),
    "mistral-7b": ModelShape(
        layers=32,
        hidden=4096,
        ffn=14336,
        heads=32,
        kv_heads=8,
        vocabulary=32000,
        class_name="MistralForCausalLM",
    ),
}
"""By the names of `--shape`; `small` is for CPUs."""


def write_random_weights(gpt: Any, arch: Architecture, folder: str) -> None:
    """Fills a rank's model in place, on the GPU where there is one; norms are 1, biases 0."""
    if torch.cuda.is_available():
        gpt.to(torch.device("cuda", torch.cuda.current_device()))
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairShape:
    """How long the parts of a pair are, in tokens."""

    context: int
    """The longest row."""
    turns: int
    answer: int
    """Mean of the answers; each is up to 3/7 shorter or longer (200 to 500 at 350)."""
    equal_answers: bool = False
    """All answers have the mean's length."""
    question: int
    chunk: int
    """The short row's excerpt of the document, one a turn."""


def random_pair(shape: PairShape, *, vocabulary: int, seed: int = 0) -> PreferenceRow:
    """Returns a pair of LongPO's shape: one document; in each turn a question and two answers."""
    rng = np.random.default_rng(seed)
    questions = [_tokens(rng, shape.question, vocabulary) for _ in range(shape.turns)]
    answers = [
        [_tokens(rng, _answer_length(rng, shape), vocabulary) for _ in range(shape.turns)]
        for _ in range(2)
    ]
    longest = max(sum(map(len, branch)) for branch in answers)
    num_document = shape.context - shape.turns * shape.question - longest
    assert num_document > 0, f"a context of {shape.context} has no room for a document"
    document = _tokens(rng, num_document, vocabulary)
    chunks = [_tokens(rng, shape.chunk, vocabulary) for _ in range(shape.turns)]

    def long_row(branch: list[np.ndarray]) -> TokenRow:
        parts: list[tuple[np.ndarray, bool]] = [(document, False)]
        for question, answer in zip(questions, branch, strict=True):
            parts += [(question, False), (answer, True)]
        return _row(parts)

    def short_rows(branch: list[np.ndarray]) -> tuple[TokenRow, ...]:
        return tuple(
            _row([(chunk, False), (question, False), (answer, True)])
            for chunk, question, answer in zip(chunks, questions, branch, strict=True)
        )

    return PreferenceRow(
        id=f"bench {seed}",
        source="bench",
        chosen=long_row(answers[0]),
        rejected=long_row(answers[1]),
        reference_chosen=short_rows(answers[0]),
        reference_rejected=short_rows(answers[1]),
    )


def _answer_length(rng: Generator, shape: PairShape) -> int:
    mean = shape.answer
    if shape.equal_answers:
        return mean
    return max(1, int(rng.integers(mean - mean * 3 // 7, mean + mean * 3 // 7 + 1)))


def _tokens(rng: Generator, count: int, vocabulary: int) -> np.ndarray:
    return rng.integers(0, vocabulary, count)


def _row(parts: list[tuple[np.ndarray, bool]]) -> TokenRow:
    """Joins parts, each with whether its tokens are labelled."""
    return TokenRow(
        input_ids=np.concatenate([tokens for tokens, _ in parts]),
        labels=np.concatenate(
            [
                tokens if is_answer else np.full(len(tokens), IGNORED_LABEL)
                for tokens, is_answer in parts
            ]
        ),
    )
