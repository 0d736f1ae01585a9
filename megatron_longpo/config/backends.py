"""Settings of what answers; imports neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_longpo.config.fields import limits


@dataclass(kw_only=True)
class ServerConfig:
    """An OpenAI-compatible server (vLLM, SGLang, llama.cpp), for backend: server."""

    endpoints: list[str] = field(default_factory=list)
    """URLs up to and with /v1; requests are spread over several, and move on when one fails."""
    model: str | None = None
    """The model's name on the server; null = the only one that it serves."""
    api: Literal["chat", "completions"] = "chat"
    """`chat`: the server's chat template; `completions`: the token ids of ours, which the labels of
    longpo tokenize are held to."""
    api_key_env: str = "LONGPO_API_KEY"
    """Environment variable that holds the API key; no key is sent where it is not set."""
    concurrency: int = field(default=16, metadata=limits(at_least=1))
    """Most requests under way, over all endpoints together."""
    timeout_seconds: float = field(default=600.0, metadata=limits(above=0))
    """Longest wait for one answer."""
    retries: int = field(default=5, metadata=limits(at_least=0))
    """How often a request that failed is sent again, after 1, 2, 4 ... seconds, before its document
    is put aside. Requests that reach no endpoint wait, and do not count."""
    outage_minutes: float = field(default=10.0, metadata=limits(at_least=0))
    """How long no endpoint may be reached before the run stops, to be resumed."""
    extra_body: dict[str, Any] | None = None
    """Further keys of every request, such as {chat_template_kwargs: {enable_thinking: false}}."""


@dataclass(kw_only=True)
class BackendConfig:
    """The model that writes, and where it runs."""

    model: str
    """The model's Hugging Face folder or hub id; its tokenizer is used with a server too."""
    backend: Literal["transformers", "server"] = "transformers"
    """`transformers` loads the model here; `server` asks the endpoints of `server`."""
    chat_template: str | None = None
    """Path of a Jinja file to use in place of the tokenizer's own chat template."""
    context_length: int | None = field(default=None, metadata=limits(at_least=1))
    """Most tokens of a prompt with its answer; null = the positions in the model's config."""
    rope_theta: float | None = field(default=None, metadata=limits(above=0))
    """RoPE base of the model, for transformers; null = its own."""
    documents_at_once: int | None = field(default=None, metadata=limits(at_least=1))
    """Documents under way at the same time, whose answers transformers writes together, on a GPU by
    CUDA graphs; null = 32 on a GPU (of models whose RoPE does not change with the length), else 1.
    With more than one, bf16 answers may differ from run to run."""
    batch_size: int = field(default=8, metadata=limits(at_least=1))
    """Most requests of a document that transformers answers together."""
    batch_tokens: int | None = field(default=None, metadata=limits(at_least=1))
    """Most tokens whose keys and values transformers holds together, where a batch is of more than
    one request; null = what 0.6 of the GPU memory beside the model holds, no bound on a CPU."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Number format of the model, for transformers."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto` = cuda where there is one; for transformers."""
    num_threads: int | None = field(default=None, metadata=limits(at_least=1))
    """CPU threads of torch; null = torch's own choice."""
    server: ServerConfig = field(default_factory=ServerConfig)
