"""Norms are recomputed without Transformer Engine, however often Megatron is mended."""

from __future__ import annotations

from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

from megatron_longpo.model.norm_recompute import mend_norm_recompute


def test_recomputation_asks_for_no_fp8_and_is_mended_once() -> None:
    mend_norm_recompute()
    assert not CheckpointWithoutOutput().fp8 and not CheckpointWithoutOutput(fp8=False).fp8
    assert CheckpointWithoutOutput(fp8="recipe").fp8
    mended = CheckpointWithoutOutput.__init__
    mend_norm_recompute()
    assert CheckpointWithoutOutput.__init__ is mended
