"""From the settings to what answers."""

from __future__ import annotations

from megatron_longpo.generation.backends.base import Backend
from megatron_longpo.generation.backends.config import BackendConfig


def make_backend(config: BackendConfig) -> Backend:
    """The backend of the settings, ready to answer; raises `UserError` where it cannot."""
    from megatron_longpo.generation.backends.transformers import TransformersBackend

    return TransformersBackend(config)
