"""The config of evaluation: what is measured, in training and by `longpo evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_longpo.config.fields import limits
from megatron_longpo.config.names import RetrievalKind
from megatron_longpo.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalConfig:
    """Numbers hidden in long texts and asked for in the model's chat template; null = off."""

    kinds: tuple[RetrievalKind, ...] = ("passkey",)
    """passkey = one number in a text; multi_needle = one number at every depth of the same text,
    each asked for by name."""
    lengths: tuple[int, ...] = field(
        default=(4096, 8192, 16384, 32768), metadata=limits(at_least=1)
    )
    """Tokens of a whole row: prompt and answer."""
    depths: tuple[float, ...] = field(
        default=(0.0, 0.25, 0.5, 0.75, 1.0), metadata=limits(at_least=0, at_most=1)
    )
    """Where in the text the number is, from 0 (beginning) to 1 (end)."""
    samples: int = field(default=4, metadata=limits(at_least=1))
    """Number of texts of every length; each has its own numbers."""
    haystack: str | None = None
    """Text to hide the numbers in, from documents that are not trained on: a text file, a folder of
    them, or JSONL with one text per line; null = plain sentences that come with this package."""
    seed: int = field(default=0, metadata=limits(at_least=0))
    """Seed of numbers, texts and names; the same seed gives the same rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NllConfig:
    """Negative log-likelihood of long documents by position in the row; null = off."""

    documents: str
    """Documents that are not trained on: a text file, a folder of them, or JSONL with one text per
    line."""
    length: int = field(default=32768, metadata=limits(at_least=2))
    """Tokens of a row. Longer documents are cut and shorter ones left out, so that every position
    is measured on the same documents."""
    samples: int = field(default=8, metadata=limits(at_least=1))
    """Maximum documents to score; the first ones that are long enough are taken."""
    bucket: int = field(default=4096, metadata=limits(at_least=1))
    """Positions of the first bucket; each next bucket ends at twice the end of the one before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionConfig:
    """How much of the base model remains on short prompts: KL and top-1 agreement; null = off."""

    prompts: str | None = None
    """JSONL with a conversation (`messages`) or a text (`prompt`) per line; null = 24 short chats
    that come with this package."""
    max_length: int = field(default=2048, metadata=limits(at_least=2))
    """Maximum tokens of a prompt; a longer one is an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """What is measured in addition to data.eval_path (docs/evaluation.md)."""

    retrieval: RetrievalConfig | None = None
    nll: NllConfig | None = None
    retention: RetentionConfig | None = None

    @property
    def is_off(self) -> bool:
        """Whether nothing is measured."""
        return self.retrieval is None and self.nll is None and self.retention is None


def check_evaluation(config: EvaluationConfig) -> None:
    """Refuses lists that are empty or name a thing twice, and buckets longer than a row."""
    retrieval, nll = config.retrieval, config.nll
    if retrieval is not None:
        for name in ("kinds", "lengths", "depths"):
            values = getattr(retrieval, name)
            shown = f"evaluation.retrieval.{name} ([{', '.join(map(str, values))}])"
            if not values:
                raise UserError(f"{shown} leaves nothing to measure. Name one, or leave it out")
            if len(set(values)) != len(values):
                raise UserError(f"{shown}: a value stands twice. Name each once")
    if nll is not None and nll.bucket > nll.length:
        raise UserError(
            f"evaluation.nll.bucket ({nll.bucket}) must not exceed evaluation.nll.length "
            f"({nll.length}). Lower it, or leave it out"
        )
