"""Makes the backend that a config asks for."""

from __future__ import annotations

import importlib.util

from megatron_longpo.config.backends import BackendConfig
from megatron_longpo.errors import UserError
from megatron_longpo.generation.backends.base import Backend


def make_backend(config: BackendConfig) -> Backend:
    """Makes the backend of a config, ready to answer; raises `UserError` if it cannot be."""
    if config.backend == "transformers":
        if config.server.endpoints:
            raise UserError("backend (transformers): has no server.endpoints; set backend: server")
        from megatron_longpo.generation.backends.transformers import TransformersBackend

        return TransformersBackend(config)
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
    if importlib.util.find_spec("openai") is None:
        raise UserError(
            "backend (server): needs the package openai; pip install 'megatron_longpo[server]'"
        )
    from megatron_longpo.generation.backends.server import ServerBackend

    return ServerBackend(config)
