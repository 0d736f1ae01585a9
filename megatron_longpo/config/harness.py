"""Settings of the suites; imports neither torch nor lm-evaluation-harness."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_longpo.config.backends import ServerConfig
from megatron_longpo.config.fields import limits


@dataclass(kw_only=True)
class HarnessConfig:
    """How `suite` is run by lm-evaluation-harness; null = as the suite's file says."""

    backend: Literal["hf", "vllm", "megatron"] = "hf"
    """`hf` (transformers) and `vllm` are the harness's; `megatron` scores the options of suites
    that have some (mmlu, arc_challenge, hellaswag, winogrande) in Megatron, under any layout."""
    lengths: tuple[int, ...] | None = None
    """RULER's lengths: most tokens of a prompt with its answer."""
    samples: int | None = field(default=None, metadata=limits(at_least=1))
    """Most samples of a task, of RULER at each length."""
    tasks: tuple[str, ...] | None = None
    """Only these tasks of the suites; numbers of a suite are then over these."""
    chat_template: bool | None = None
    """Whether prompts are messages in the model's chat template."""
    max_length: int | None = field(default=None, metadata=limits(at_least=1))
    """Most tokens of a prompt with its answer; null = the model's positions, for RULER the length.
    Longer documents lose their middle."""
    batch_size: int = field(default=1, metadata=limits(at_least=1))
    """Prompts that transformers reads together; vLLM chooses itself."""
    model_args: dict[str, Any] | None = None
    """Further arguments of the harness's model, such as {tensor_parallel_size: 8} for vllm."""
    data: str | None = None
    """Folder of local files in place of the hub: NAME/SPLIT.jsonl, NAME as in the hub with __ for
    each slash; of RULER ruler/*.json; of judged suites SUITE/*."""
    seed: int = 42
    """Of RULER's rows."""
    judge: ServerConfig = field(default_factory=ServerConfig)
    """What scores mt_bench and longbench_chat: an OpenAI-compatible server."""
    judge_tokens: int = field(default=2048, metadata=limits(at_least=1))
    """Most tokens of a verdict."""
