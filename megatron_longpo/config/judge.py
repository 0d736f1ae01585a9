"""The config of `longpo judge`."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_longpo.config.backends import BackendConfig, check_backend
from megatron_longpo.config.fields import check_limits, limits


@dataclass(kw_only=True)
class JudgeConfig(BackendConfig):
    """A model scores the answers of preference examples; examples may be dropped by score."""

    examples: str
    """Examples file that longpo generate wrote."""
    output: str
    """Examples file to write, with scores in `meta.judge`. Until it is complete, scores are in
    output.scores; the same command resumes from there."""
    least_support: float | None = field(default=None, metadata=limits(at_least=1, at_most=5))
    """Drop turns if the chunk supports the chosen answer less than this, 1 to 5; null = none."""
    least_better: float | None = field(default=None, metadata=limits(at_least=0, at_most=1))
    """Drop turns with a lower preference for chosen: 1 = chosen wins in both orders of the two
    answers, 0.5 = in one order, or neither answer is better, 0 = in no order; null = none."""
    max_new_tokens: int = field(default=64, metadata=limits(at_least=1))
    """Maximum tokens of a verdict; models that think need more."""
    skip_failed: bool = False
    """Write the output without the examples whose requests failed for good."""
    overwrite: bool = False
    """Replace an existing output, and start again instead of resuming."""


def resolve_judge(config: JudgeConfig) -> JudgeConfig:
    """Returns the config, checked; nothing in it depends on other settings."""
    check_limits(config)
    check_backend(config)
    return config
