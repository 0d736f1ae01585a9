"""Lets Megatron-Core recompute norms where Transformer Engine is not installed (0.16.1 to 0.19).

Megatron's recomputation of norms asks Transformer Engine about fp8 even if no fp8 is on, which
fails without it.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.random import CheckpointWithoutOutput


def mend_norm_recompute() -> None:
    """Stops Megatron's norm recomputation from asking for fp8. A second call does nothing."""
    if CheckpointWithoutOutput().fp8:
        original = CheckpointWithoutOutput.__init__

        def without_fp8(self: CheckpointWithoutOutput, fp8: Any = False) -> None:
            # Megatron takes any value but None, its own default False too, for fp8.
            original(self, fp8 or None)

        CheckpointWithoutOutput.__init__ = without_fp8
