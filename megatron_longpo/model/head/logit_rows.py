"""Row-wise arithmetic over a chunk of logits: log-sum-exps, targets' logits, gradients.

On GPUs each is one Triton kernel that reads the logits once, in their own dtype, and computes in
fp32. Elsewhere, and where Triton is missing, it is plain torch in fp32 or better.

Letters: c edges of a chunk, v this rank's rows of the padded vocabulary.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor


def row_statistics(logits: Tensor, targets: Tensor, *, num_valid: int) -> tuple[Tensor, Tensor]:
    """Returns the log-sum-exp of every row, and the logit of its target.

    Args:
        logits: [c,v]; not changed.
        targets: [c] int64 columns; -1 where the target is on another rank.
        num_valid: columns that stand for a token; those after it have probability 0.

    Returns:
        2 x [c] in fp32 at least: log-sum-exps in nats, and logits, 0 where the target is -1.
    """
    kernels = _triton_kernels(logits)
    if kernels is not None:
        statistics: tuple[Tensor, Tensor] = kernels.row_statistics(logits, targets, num_valid)
        return statistics
    exact = logits[:, :num_valid].to(_accumulator(logits))
    picked = logits.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return torch.logsumexp(exact, dim=-1), picked.masked_fill(targets < 0, 0).to(exact.dtype)


def logits_gradient_(
    logits: Tensor, targets: Tensor, normalizers: Tensor, grads: Tensor, *, num_valid: int
) -> Tensor:
    """Overwrites logits with grad * d logp / d logits = grad * (onehot(target) - softmax).

    Args:
        logits: [c,v].
        targets: [c] int64 columns; -1 where the target is on another rank.
        normalizers: [c] log-sum-exps over the whole vocabulary.
        grads: [c] gradients of the log-probabilities.
        num_valid: columns that stand for a token; the others' gradient is 0.

    Returns:
        `logits`, in their own dtype.
    """
    kernels = _triton_kernels(logits)
    if kernels is not None:
        kernels.logits_gradient_(logits, targets, normalizers, grads, num_valid)
        return logits
    exact = logits.to(_accumulator(logits)) if logits.dtype != normalizers.dtype else logits
    exact = exact.sub_(normalizers[:, None]).exp_().neg_()
    is_here = (targets >= 0).to(exact.dtype)
    exact.scatter_add_(1, targets.clamp(min=0)[:, None], is_here[:, None])
    exact.mul_(grads[:, None])
    exact[:, num_valid:] = 0
    return logits if exact is logits else logits.copy_(exact)


def _accumulator(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _triton_kernels(logits: Tensor) -> Any:
    return _imported_kernels() if logits.is_cuda and logits.dtype != torch.float64 else None


@functools.cache
def _imported_kernels() -> Any:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("megatron_longpo.model.head.logit_rows_triton")
