"""The config of the suites that lm-evaluation-harness runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_longpo.config.backends import ServerConfig
from megatron_longpo.config.fields import limits


@dataclass(kw_only=True)
class HarnessConfig:
    """How lm-evaluation-harness runs `suite`; null = as the suite's file says."""

    backend: Literal["hf", "vllm", "megatron"] = "hf"
    """`hf` (transformers) and `vllm` are backends of the harness. `megatron` runs in Megatron with
    the sizes of parallel, only suites of options to choose from (mmlu, arc_challenge, hellaswag,
    winogrande)."""
    lengths: tuple[int, ...] | None = field(default=None, metadata=limits(at_least=1))
    """RULER's lengths: maximum tokens of a prompt with its answer."""
    samples: int | None = field(default=None, metadata=limits(at_least=1))
    """Maximum samples of a task; for RULER, at each length."""
    tasks: tuple[str, ...] | None = None
    """Run only these tasks of the suites; the number of a suite is then over these tasks."""
    chat_template: bool | None = None
    """Whether prompts are put into the model's chat template."""
    max_length: int | None = field(default=None, metadata=limits(at_least=1))
    """Maximum tokens of a prompt with its answer; null = the model's positions, for RULER the
    length. Longer documents are cut in their middle."""
    batch_size: int = field(default=1, metadata=limits(at_least=1))
    """Prompts that transformers reads together; vLLM chooses its own number."""
    model_args: dict[str, Any] | None = None
    """Further arguments of the harness's model, such as {tensor_parallel_size: 8} for vllm."""
    data: str | None = None
    """Folder of local files to use instead of the hub: NAME/SPLIT.jsonl, where NAME is the hub id
    with __ for each slash; ruler/*.json for RULER; SUITE/* for judged suites."""
    seed: int = 42
    """Seed of RULER's rows."""
    judge: ServerConfig = field(default_factory=ServerConfig)
    """The OpenAI-compatible server that scores mt_bench and longbench_chat."""
    judge_tokens: int = field(default=2048, metadata=limits(at_least=1))
    """Maximum tokens of a verdict."""
