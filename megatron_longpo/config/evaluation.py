"""The settings of evaluation: what is measured, in training and by `longpo evaluate`.

Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_longpo.config.fields import limits
from megatron_longpo.errors import UserError

RetrievalKind = Literal["passkey", "multi_needle"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalConfig:
    """Numbers hidden in long texts and asked for in the model's chat format; null = off."""

    kinds: tuple[RetrievalKind, ...] = ("passkey",)
    """passkey = one number in a text; multi_needle = one at every depth of the same text, each
    asked for by name."""
    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768)
    """Tokens of a whole row: prompt and answer."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where in the text the number is, from 0 (its beginning) to 1 (its end)."""
    samples: int = field(default=4, metadata=limits(at_least=1))
    """Texts of every length; each has its own numbers."""
    haystack: str | None = None
    """Text to hide them in: a text file, a folder of them, or JSONL with a text a line, of
    documents that are not trained on; null = plain sentences that come with this package."""
    seed: int = field(default=0, metadata=limits(at_least=0))
    """Seed of numbers, texts and names; the same seed gives the same rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NllConfig:
    """Negative log-likelihood of long documents by position in the row; null = off."""

    documents: str
    """Documents that are not trained on: a text file, a folder of them, or JSONL with a text a
    line."""
    length: int = field(default=32768, metadata=limits(at_least=2))
    """Tokens of a row. Longer documents are cut, shorter ones left out, so that all positions see
    the same documents."""
    samples: int = field(default=8, metadata=limits(at_least=1))
    """Most documents to score; the first ones that are long enough are taken."""
    bucket: int = field(default=4096, metadata=limits(at_least=1))
    """Positions of the first bucket; each further one ends at twice the last one's end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionConfig:
    """What is left of the base model on short prompts: KL and top-1 agreement; null = off."""

    prompts: str | None = None
    """JSONL with `messages`, a conversation, or `prompt`, a text, a line; null = 24 short chats
    that come with this package."""
    max_length: int = field(default=2048, metadata=limits(at_least=2))
    """Most tokens of a prompt; a longer one is refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """What is measured beside the rows of data.eval_path (docs/evaluation.md)."""

    retrieval: RetrievalConfig | None = None
    nll: NllConfig | None = None
    retention: RetentionConfig | None = None

    @property
    def is_off(self) -> bool:
        return self.retrieval is None and self.nll is None and self.retention is None


def check_evaluation(config: EvaluationConfig) -> None:
    """Refuses lists that name nothing, the same thing twice, or what is out of range."""
    retrieval, nll = config.retrieval, config.nll
    if retrieval is not None:
        for name in ("kinds", "lengths", "depths"):
            values = getattr(retrieval, name)
            shown = f"evaluation.retrieval.{name} ([{', '.join(map(str, values))}])"
            if not values:
                raise UserError(f"{shown} leaves nothing to measure. Name one, or leave it out")
            if len(set(values)) != len(values):
                raise UserError(f"{shown}: a value stands twice. Name each once")
        if bad := [length for length in retrieval.lengths if length < 1]:
            raise UserError(f"evaluation.retrieval.lengths ({bad[0]}) must be at least 1")
        if bad_depths := [depth for depth in retrieval.depths if not 0 <= depth <= 1]:
            raise UserError(
                f"evaluation.retrieval.depths ({bad_depths[0]:g}) must be at least 0 and at most 1"
            )
    if nll is not None and nll.bucket > nll.length:
        raise UserError(
            f"evaluation.nll.bucket ({nll.bucket}) must not exceed evaluation.nll.length "
            f"({nll.length}). Lower it, or leave it out"
        )
