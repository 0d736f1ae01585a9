"""How torch is to hand out GPU memory; decided before torch is imported."""

from __future__ import annotations

import importlib.metadata
import os


def allow_expandable_segments() -> None:
    """Lets torch's GPU memory grow in place, unless the user has set its allocator up.

    Lengths differ from pair to pair, and with fixed segments every length leaves holes that the
    next does not fit. Does nothing on a machine without a GPU.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if any(name in os.environ for name in names):
        return
    version = importlib.metadata.version("torch").split(".")
    is_renamed = (int(version[0]), int(version[1])) >= (2, 9)
    os.environ[names[0] if is_renamed else names[1]] = "expandable_segments:True"
