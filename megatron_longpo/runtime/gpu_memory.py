"""The setting of torch's GPU memory allocator, made before torch is imported."""

from __future__ import annotations

import importlib.metadata
import os


def allow_expandable_segments() -> None:
    """Lets torch's GPU memory segments grow, unless the user has configured the allocator.

    Lengths differ from pair to pair. With fixed segments every length leaves holes that the next
    one does not fit into. On a machine without a GPU this has no effect.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if any(name in os.environ for name in names):
        return
    version = importlib.metadata.version("torch").split(".")
    is_renamed = (int(version[0]), int(version[1])) >= (2, 9)
    os.environ[names[0] if is_renamed else names[1]] = "expandable_segments:True"
