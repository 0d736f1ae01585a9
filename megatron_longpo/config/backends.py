"""The config of the model that writes answers, for `longpo generate` and `longpo judge`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from megatron_longpo.config.fields import limits
from megatron_longpo.config.names import Dtype
from megatron_longpo.errors import UserError


@dataclass(kw_only=True)
class ServerConfig:
    """An OpenAI-compatible server (vLLM, SGLang, llama.cpp), for backend: server."""

    endpoints: list[str] = field(default_factory=list)
    """URLs, each with its /v1. Requests are spread over them; if one fails, others take its
    requests."""
    model: str | None = None
    """The model's name on the server; null = the only one that it serves."""
    api: Literal["chat", "completions"] = "chat"
    """`chat`: the server applies its chat template; `completions`: the server gets token ids, the
    same that longpo tokenize makes."""
    api_key_env: str = "LONGPO_API_KEY"
    """Environment variable that holds the API key; if it is not set, no key is sent."""
    concurrency: int = field(default=16, metadata=limits(at_least=1))
    """Maximum requests at the same time, over all endpoints together."""
    timeout_seconds: float = field(default=600.0, metadata=limits(above=0))
    """Longest wait for one answer."""
    retries: int = field(default=5, metadata=limits(at_least=0))
    """How often a failed request is sent again, after 1, 2, 4 ... seconds, before its document is
    put aside. Requests that reach no endpoint wait, and do not count."""
    outage_minutes: float = field(default=10.0, metadata=limits(at_least=0))
    """If no endpoint can be reached for so long, the run stops; the same command resumes it."""
    extra_body: dict[str, Any] | None = None
    """Further keys of every request, such as {chat_template_kwargs: {enable_thinking: false}}."""


@dataclass(kw_only=True)
class BackendConfig:
    """The model that writes, and where it runs."""

    model: str
    """Hugging Face folder or hub id of the model; with a server, its tokenizer is used."""
    backend: Literal["transformers", "server"] = "transformers"
    """`transformers` loads the model in this process; `server` asks the endpoints of `server`."""
    chat_template: str | None = None
    """Path of a Jinja file that replaces the tokenizer's own chat template."""
    context_length: int | None = field(default=None, metadata=limits(at_least=1))
    """Maximum tokens of a prompt with its answer; null = the positions in the model's config."""
    rope_theta: float | None = field(default=None, metadata=limits(above=0))
    """RoPE base of the model, for transformers; null = its own."""
    documents_at_once: int | None = field(default=None, metadata=limits(at_least=1))
    """Number of documents that transformers works on at the same time, on a GPU with CUDA graphs.
    null = 32 on a GPU (if the model's RoPE does not change with the length), else 1. With more than
    one, bf16 answers may differ from run to run."""
    batch_size: int = field(default=8, metadata=limits(at_least=1))
    """Maximum requests of a document that transformers answers together."""
    batch_tokens: int | None = field(default=None, metadata=limits(at_least=1))
    """Maximum tokens whose keys and values transformers holds at once, if a batch has more than one
    request; null = what fits into 0.6 of the GPU memory beside the model, no bound on a CPU."""
    dtype: Dtype = "bf16"
    """Number format of the model, for transformers."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto` = cuda if there is one; for transformers."""
    num_threads: int | None = field(default=None, metadata=limits(at_least=1))
    """CPU threads of torch; null = torch's own choice."""
    server: ServerConfig = field(default_factory=ServerConfig)


def check_backend(config: BackendConfig) -> None:
    """Refuses settings of the other backend, and a server that cannot be asked."""
    if config.backend == "transformers":
        if config.server.endpoints:
            raise UserError("backend (transformers): has no server.endpoints; set backend: server")
        return
    if config.documents_at_once is not None:
        raise UserError(
            f"documents_at_once ({config.documents_at_once}): is for backend: transformers; a "
            "server has server.concurrency"
        )
    if config.rope_theta is not None:
        raise UserError(
            f"rope_theta ({config.rope_theta:g}): a server has its own; set it where the server "
            "starts, and context_length here"
        )
    check_server(config.server)


def check_server(config: ServerConfig, *, key: str = "server") -> None:
    """Refuses endpoints that are no plain URLs; `key` is the section that holds the settings."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", config.api_key_env):
        # The value is not repeated: it may be the API key itself.
        raise UserError(f"{key}.api_key_env: must be the name of an environment variable")
    if not config.endpoints:
        raise UserError(f"{key}.endpoints ([]): backend: server needs at least one URL")
    for number, url in enumerate(config.endpoints):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"{key}.endpoints[{number}] ({url}): must be a URL such as http://host:8000/v1"
            )
        if parts.username or parts.password or parts.query:
            raise UserError(
                f"{key}.endpoints[{number}] ({parts.hostname}): must hold no password or query; "
                f"give a key in the environment variable of {key}.api_key_env"
            )
