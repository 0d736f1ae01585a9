"""RMSNorm with the rounding of transformers and the memory use of a fused kernel."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.Module):
    """RMSNorm of [..., hidden] in the input's dtype.

    Every norm of a model with local layers is this one: before attention and MLP, the final one, q
    and k norms.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism each tensor-parallel rank sees other tokens, so Megatron must
        # sum this weight's gradient over them; it looks for this attribute.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps only the input, its weight and one number a row for backward.

    Left to autograd, the same arithmetic keeps a float32 copy of the input: 2 GiB a norm for
    131,072 tokens of hidden size 4,096.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        # Rounded to the input's dtype before the weight comes in: transformers' order.
        return weight * (x32 * scale).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normalised = x.float() * scale
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_normalised = grad.float() * weight.float()
            along = (grad_normalised * normalised).mean(-1, keepdim=True)
            grad_x = ((grad_normalised - normalised * along) * scale).to(x.dtype)
        if ctx.needs_input_grad[1]:
            rows = (grad.float() * normalised.to(x.dtype)).reshape(-1, weight.numel())
            grad_weight = rows.sum(0).to(weight.dtype)
        return grad_x, grad_weight, None
