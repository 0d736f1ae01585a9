"""What Megatron-Core's releases lack or get wrong, mended in one place (0.16.1 to 0.19).

- RMSprop: Megatron knows Adam and SGD only. `RMSprop` is put where Megatron builds Adam.
- The distributed optimizer with torch's Adam (no Transformer Engine, no apex) loses `step` when a
  checkpoint is loaded, and lets all parameters share one `step` tensor, so that a resumed run
  drifts silently. `build_optimizer` returns one that does neither.
- Its checkpoints look parameters up behind the padding that buckets end in, in tensors that were
  gathered without it. A tied embedding under a pipeline has a bucket of its own, and was saved as
  other numbers wherever the bucket before it was padded.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer import distrib_optimizer as megatron_distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_longpo.errors import UserError

_STATE_HOLDS_STEP: bool = not megatron_distrib_optimizer.HAVE_APEX_OR_TE
"""Where Megatron found neither, it looks for `step` in each parameter's state."""

ASYNC_SAVE: dict[str, Any] = {"async_sharded_save": True}
"""How `dist_checkpointing.save` is asked for a request to write later, of Megatron's own kind."""
if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
    # 0.19 would rather have nvidia-resiliency-ext, which CPUs do without.
    ASYNC_SAVE["async_strategy"] = "mcore"

LARGEST_BATCH = 64 * 2**20
"""Parameters that RMSprop updates at a time, unless one tensor alone has more."""


SMALLEST_ALONE = 2 * 2**20
"""Elements from which on a tensor's update takes longer than its launch: smaller ones are updated
many at a time."""


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
        **settings: Any,
    ) -> None:
        self.state_dtype = state_dtype
        super().__init__(
            params,
            lr=settings["lr"],
            betas=(0.0, alpha),
            eps=eps,
            weight_decay=settings["weight_decay"],
        )

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
        initialize_inner_state(self)
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
            if _STATE_HOLDS_STEP:
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
    """Whether the one kernel that reads and writes everything once can be used, and pays."""
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
    """Cuts parameters up so that temporary copies stay small beside the optimizer's state."""
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


def build_optimizer(
    config: OptimizerConfig,
    model: Sequence[Any],
    *,
    rmsprop_alpha: float | None = None,
    state_dtype: torch.dtype = torch.float32,
) -> MegatronOptimizer:
    """Returns Megatron's optimizer over `model`; RMSprop where `rmsprop_alpha` is given.

    Averages of gradients are kept in `state_dtype`. Megatron's own precision-aware optimizer would
    also hand fp32 weights to Transformer Engine, whose checkpoints fit no other optimizer.
    """

    def make_rmsprop(params: Any, **settings: Any) -> RMSprop:
        assert rmsprop_alpha is not None
        settings.pop("eps", None)
        return RMSprop(
            params,
            alpha=rmsprop_alpha,
            eps=config.adam_eps,
            state_dtype=state_dtype,
            **settings,
        )

    if rmsprop_alpha is None and state_dtype == torch.float32:
        optimizer = get_megatron_optimizer(config, list(model))
    else:
        make: Any = make_rmsprop
        if rmsprop_alpha is None:
            make = functools.partial(
                transformer_engine_adam(), exp_avg_dtype=state_dtype, exp_avg_sq_dtype=state_dtype
            )
        # Megatron picks the class by these two names; the state's layout is Adam's.
        with (
            mock.patch.object(megatron_optimizer, "Adam", make),
            mock.patch.object(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False),
        ):
            optimizer = get_megatron_optimizer(config, list(model))
    for part in _parts(optimizer):
        part.init_state_fn = initialize_inner_state
        if isinstance(part, DistributedOptimizer):
            part.__class__ = _MendedDistributedOptimizer
    return optimizer


def transformer_engine_adam() -> Any:
    """Transformer Engine's Adam, whose averages may be of another dtype than the weights.

    Raises:
        UserError: where it cannot run.
    """
    obstacle = "it needs a GPU"
    if torch.cuda.is_available():
        try:
            return importlib.import_module("transformer_engine.pytorch.optimizers").FusedAdam
        except ImportError as error:
            obstacle = "it cannot be imported: " + " ".join(str(error).split())
    raise UserError(
        "optimizer.state_dtype (bf16): adam needs Transformer Engine for it, and "
        f"{obstacle}. Use fp32, or optimizer.name rmsprop, which needs nothing"
    )


def initialize_state(optimizer: MegatronOptimizer) -> None:
    """Gives every parameter its state, as a first step would: what loading writes into."""
    for part in _parts(optimizer):
        initialize_inner_state(part.optimizer)


def initialize_inner_state(optimizer: Any, config: OptimizerConfig | None = None) -> None:
    """Fills the empty states of a torch or Transformer Engine optimizer."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            if state:
                continue
            if not isinstance(optimizer, torch.optim.Adam):
                # Transformer Engine's, which holds no weights of its own here.
                optimizer.initialize_state(param, store_param_remainders=False)
                continue
            if _STATE_HOLDS_STEP:
                state["step"] = torch.zeros((), dtype=torch.float32)
            if isinstance(optimizer, RMSprop):
                state["exp_avg_sq"] = torch.zeros_like(param.data, dtype=optimizer.state_dtype)
                continue
            state["exp_avg"] = torch.zeros_like(param.data)
            state["exp_avg_sq"] = torch.zeros_like(param.data)


def _with_bucket_padding(packed: Tensor, buckets: Sequence[Any]) -> Tensor:
    """[sum of unpadded lengths] -> the buckets at their offsets, zeros between them."""
    last = buckets[-1]
    placed = packed.new_zeros(last.offset + last.numel_unpadded)
    parts = packed.split([bucket.numel_unpadded for bucket in buckets])
    for bucket, part in zip(buckets, parts, strict=True):
        placed[bucket.offset : bucket.offset + len(part)] = part
    return placed


def _parts(optimizer: MegatronOptimizer) -> Iterator[Any]:
    yield from getattr(optimizer, "chained_optimizers", [optimizer])


class _MendedDistributedOptimizer(DistributedOptimizer):
    """Keeps `step` through loading, one tensor a parameter; knows a state without `exp_avg`.

    Finds every parameter of a buffer with several buckets.
    """

    def get_parameter_state_dp_zero(self, *args: Any, **settings: Any) -> Any:
        state = super().get_parameter_state_dp_zero(*args, **settings)
        if state is None:
            return None
        for index, buffer in enumerate(self.buffers):
            for tensors in state[index].values():
                for key, tensor in tensors.items():
                    if isinstance(tensor, Tensor):
                        tensors[key] = _with_bucket_padding(tensor, buffer.buckets)
        return state

    def _get_main_param_and_optimizer_states(self, model_param: Any) -> dict[str, Tensor]:
        tensors = dict(super()._get_main_param_and_optimizer_states(model_param))
        if isinstance(self.optimizer, RMSprop):
            # Saved as zeros, which take no memory here: Megatron's formats have a place for it.
            square_average = tensors["exp_avg_sq"]
            tensors["exp_avg"] = square_average.new_zeros(()).expand_as(square_average)
        return tensors

    def _set_main_param_and_optimizer_states(
        self, model_param: Any, tensors: dict[str, Tensor]
    ) -> None:
        group_index, group_order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group_index]["params"][group_order]
        kept = {k: v for k, v in self.optimizer.state[main_param].items() if k == "step"}
        super()._set_main_param_and_optimizer_states(model_param, {**kept, **tensors})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()
            if isinstance(self.optimizer, RMSprop):
                state.pop("exp_avg", None)
