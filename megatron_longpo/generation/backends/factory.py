"""Makes the backend that a config asks for."""

from __future__ import annotations

import importlib.util

from megatron_longpo.config.backends import BackendConfig
from megatron_longpo.errors import UserError
from megatron_longpo.generation.backends.base import Backend


def make_backend(config: BackendConfig) -> Backend:
    """Makes the backend of a config, ready to answer; raises `UserError` if it cannot be."""
    if config.backend == "transformers":
        from megatron_longpo.generation.backends.transformers import TransformersBackend

        return TransformersBackend(config)
    if importlib.util.find_spec("openai") is None:
        raise UserError(
            "backend (server): needs the package openai; pip install 'megatron_longpo[server]'"
        )
    from megatron_longpo.generation.backends.server import ServerBackend

    return ServerBackend(config)
