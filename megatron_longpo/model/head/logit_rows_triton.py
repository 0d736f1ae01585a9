"""The Triton kernels behind logit_rows.py; imported where there is a GPU.

Both are bound by memory: one program a row (or a part of one), fp32 inside, one exponential an
element. Triton reads annotations as code, so its functions have none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096
"""Columns of a block; a vocabulary of 32,000 is 8 blocks."""
NUM_WARPS = 8


def row_statistics(logits: Tensor, targets: Tensor, num_valid: int) -> tuple[Tensor, Tensor]:
    """Computes `logit_rows.row_statistics`."""
    normalizers = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    picked = torch.empty_like(normalizers)
    if len(logits):
        _row_statistics[(len(logits),)](
            logits,
            targets,
            normalizers,
            picked,
            logits.stride(0),
            num_valid,
            BLOCK=COLUMNS,
            num_warps=NUM_WARPS,
        )
    return normalizers, picked


def logits_gradient_(
    logits: Tensor, targets: Tensor, normalizers: Tensor, grads: Tensor, num_valid: int
) -> None:
    """Computes `logit_rows.logits_gradient_`."""
    rows, columns = logits.shape
    if rows:
        _logits_gradient[(rows, triton.cdiv(columns, COLUMNS))](
            logits,
            targets,
            normalizers,
            grads.contiguous(),
            logits.stride(0),
            columns,
            num_valid,
            BLOCK=COLUMNS,
            num_warps=NUM_WARPS,
        )


@triton.jit
def _row_statistics(  # type: ignore[no-untyped-def]
    logits,
    targets,
    normalizers,
    picked,
    row_stride,
    num_valid,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = logits + row * row_stride
    # Finite, so that a row without a valid column gives no NaN.
    highest = -1.0e30
    total = 0.0
    for start in range(0, num_valid, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(begin + columns, mask=columns < num_valid, other=-float("inf"))
        values = values.to(tl.float32)
        new_highest = tl.maximum(highest, tl.max(values, axis=0))
        total = total * tl.exp(highest - new_highest) + tl.sum(tl.exp(values - new_highest), axis=0)
        highest = new_highest
    tl.store(normalizers + row, highest + tl.log(total))
    target = tl.load(targets + row)
    value = tl.load(begin + target, mask=target >= 0, other=0.0)
    tl.store(picked + row, value.to(tl.float32))


@triton.jit
def _logits_gradient(  # type: ignore[no-untyped-def]
    logits,
    targets,
    normalizers,
    grads,
    row_stride,
    num_columns,
    num_valid,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places = logits + row * row_stride + columns
    values = tl.load(places, mask=columns < num_valid, other=-float("inf")).to(tl.float32)
    softmax = tl.exp(values - tl.load(normalizers + row))
    onehot = tl.where(columns == tl.load(targets + row), 1.0, 0.0)
    gradient = (onehot - softmax) * tl.load(grads + row)
    tl.store(places, gradient.to(logits.dtype.element_ty), mask=columns < num_columns)
