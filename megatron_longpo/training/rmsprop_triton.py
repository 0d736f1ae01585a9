"""RMSprop's update as one Triton kernel; imported only if there is a GPU.

With torch's operators, weights, gradients and square averages pass through memory several times,
and the square averages are copied.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def update(
    param: Tensor,
    grad: Tensor,
    square_average: Tensor,
    *,
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Updates `param` and `square_average` in place.

    v = alpha v + (1 - alpha) g^2;  p = p - lr g / (sqrt(v) + eps), with g += weight_decay p.

    All three are contiguous and fp32, but `square_average` may be bf16: it is rounded where it is
    stored.
    """
    count = param.numel()
    if count:
        _update[(triton.cdiv(count, BLOCK),)](
            param.data, grad, square_average, count, lr, alpha, eps, weight_decay, BLOCK=BLOCK
        )


# Triton reads annotations as code: its functions have none.
@triton.jit
def _update(  # type: ignore[no-untyped-def]
    param, grad, square_average, count, lr, alpha, eps, weight_decay, BLOCK: tl.constexpr
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < count
    p = tl.load(param + places, mask=mask)
    g = tl.load(grad + places, mask=mask) + weight_decay * p
    v = tl.load(square_average + places, mask=mask).to(tl.float32)
    v = alpha * v + (1 - alpha) * g * g
    tl.store(square_average + places, v, mask=mask)
    # IEEE root and division, as torch's.
    p -= lr * tl.div_rn(g, tl.sqrt_rn(v) + eps)
    tl.store(param + places, p, mask=mask)
