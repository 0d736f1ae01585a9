"""RMSprop with a state that Megatron-Core takes for Adam's; Megatron knows Adam and SGD only."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer
from torch import Tensor

STATE_HOLDS_STEP: bool = not distrib_optimizer.HAVE_APEX_OR_TE
"""Where Megatron found neither apex nor Transformer Engine, it looks for `step` in each parameter's
state."""

LARGEST_BATCH = 64 * 2**20
"""Most elements that RMSprop updates at a time, unless one tensor alone has more."""
SMALLEST_ALONE = 2 * 2**20
"""From this many elements on, a tensor's update takes longer than its launch; smaller tensors are
updated many at a time."""


class RMSprop(torch.optim.AdamW):
    """torch.optim.RMSprop's update, with a state that Megatron takes for Adam's.

    v = alpha v + (1 - alpha) g^2;  p = p - lr g / (sqrt(v) + eps). `v` is stored as `exp_avg_sq`,
    which is what Megatron's distributed optimizer shards and saves; there is no `exp_avg`. In
    memory it is of `state_dtype`, and the arithmetic is fp32.
    """

    def __init__(
        self,
        params: Any,
        *,
        alpha: float,
        eps: float,
        state_dtype: torch.dtype = torch.float32,
        **arguments: Any,
    ) -> None:
        self.state_dtype = state_dtype
        super().__init__(
            params,
            lr=arguments["lr"],
            betas=(0.0, alpha),
            eps=eps,
            weight_decay=arguments["weight_decay"],
        )

    def initialize_state(self, param: Tensor) -> None:
        """Gives a parameter its first state, unless it has one."""
        state = self.state[param]
        if state:
            return
        if STATE_HOLDS_STEP:
            state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg_sq"] = torch.zeros_like(param.data, dtype=self.state_dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Adam's own looks for `step` in every state, which ours lacks beside Transformer Engine.
        torch.optim.Optimizer.__setstate__(self, state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # Torch gives a state its parameter's dtype.
        for state in self.state.values():
            state["exp_avg_sq"] = state["exp_avg_sq"].to(self.state_dtype)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "Megatron steps without a closure"
        for group in self.param_groups:
            for param in group["params"]:
                self.initialize_state(param)
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            others = []
            for param in params:
                if _is_updated_alone(param):
                    self._update_alone(param, group)
                else:
                    others.append(param)
            for batch in _batches(others):
                self._update(batch, group)
            if STATE_HOLDS_STEP:
                torch._foreach_add_([self.state[param]["step"] for param in params], 1)

    def _update_alone(self, param: Tensor, group: dict[str, Any]) -> None:
        from megatron_longpo.training.rmsprop_triton import update

        assert param.grad is not None
        update(
            param,
            param.grad,
            self.state[param]["exp_avg_sq"],
            lr=group["lr"],
            alpha=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [grad for param in params if (grad := param.grad) is not None]
        if group["weight_decay"]:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        kept = [self.state[param]["exp_avg_sq"] for param in params]
        square_averages = [tensor.float() for tensor in kept]
        alpha = group["betas"][1]
        torch._foreach_mul_(square_averages, alpha)
        torch._foreach_addcmul_(square_averages, grads, grads, 1 - alpha)
        if self.state_dtype != torch.float32:
            torch._foreach_copy_(kept, square_averages)
        denominators = torch._foreach_sqrt(square_averages)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(params, grads, denominators, -group["lr"])


def _is_updated_alone(param: Tensor) -> bool:
    """Tells whether the kernel that reads and writes everything once can be used, and is faster."""
    grad = param.grad
    return (
        param.numel() >= SMALLEST_ALONE
        and param.is_cuda
        and grad is not None
        and param.dtype == grad.dtype == torch.float32
        and param.is_contiguous()
        and grad.is_contiguous()
        and importlib.util.find_spec("triton") is not None
    )


def _batches(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yields parameters in batches, so that temporary copies stay small beside the state."""
    batch: list[Tensor] = []
    size = 0
    for param in params:
        size += param.numel()
        if batch and size > LARGEST_BATCH:
            yield batch
            batch, size = [], param.numel()
        batch.append(param)
    if batch:
        yield batch
