"""Settings of `longpo judge`; imports neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_longpo.config.backends import BackendConfig
from megatron_longpo.config.fields import limits


@dataclass(kw_only=True)
class JudgeConfig(BackendConfig):
    """A model scores the answers of preference examples, and examples may be dropped by score."""

    examples: str
    """What longpo generate wrote."""
    output: str
    """The examples file with scores in `meta.judge`; until it is complete, scores are in
    output.scores, from which the same command goes on."""
    least_support: float | None = field(default=None, metadata=limits(at_least=1, at_most=5))
    """Drop turns whose chosen answer has less support in its chunk, 1 to 5; null = none."""
    least_better: float | None = field(default=None, metadata=limits(at_least=0, at_most=1))
    """Drop turns where chosen beats rejected less: 1 = in both orders of the two, 0.5 = in one or
    neither is better, 0 = in no order; null = none."""
    max_new_tokens: int = field(default=64, metadata=limits(at_least=1))
    """Most tokens of a verdict; models that think need more."""
    skip_failed: bool = False
    """Write the output without examples whose requests failed for good."""
    overwrite: bool = False
    """Replace an output that exists, and begin anew rather than go on."""
