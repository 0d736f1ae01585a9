"""Builds Megatron-Core's optimizer, and mends what its releases get wrong (0.16.1 to 0.19).

- RMSprop and Transformer Engine's Adam with averages in bf16 are put where Megatron builds Adam.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_longpo.errors import UserError
from megatron_longpo.training.rmsprop import STATE_HOLDS_STEP, RMSprop


def build_optimizer(
    config: OptimizerConfig,
    model: Sequence[Any],
    *,
    rmsprop_alpha: float | None = None,
    state_dtype: torch.dtype = torch.float32,
) -> MegatronOptimizer:
    """Returns Megatron's optimizer over `model`: RMSprop if `rmsprop_alpha` is given, else Adam.

    Averages of gradients are kept in `state_dtype`. Megatron's own precision-aware optimizer would
    also hand fp32 weights to Transformer Engine, whose checkpoints fit no other optimizer.
    """

    def make_rmsprop(params: Any, **arguments: Any) -> RMSprop:
        assert rmsprop_alpha is not None
        arguments.pop("eps", None)
        return RMSprop(
            params,
            alpha=rmsprop_alpha,
            eps=config.adam_eps,
            state_dtype=state_dtype,
            **arguments,
        )

    if rmsprop_alpha is None and state_dtype == torch.float32:
        optimizer = get_megatron_optimizer(config, list(model))
    else:
        make: Any = make_rmsprop
        if rmsprop_alpha is None:
            make = functools.partial(
                transformer_engine_adam(), exp_avg_dtype=state_dtype, exp_avg_sq_dtype=state_dtype
            )
        with _building_with(make):
            optimizer = get_megatron_optimizer(config, list(model))
    for part in _parts(optimizer):
        part.init_state_fn = initialize_inner_state
        if isinstance(part, DistributedOptimizer):
            part.__class__ = _MendedDistributedOptimizer
    return optimizer


@contextmanager
def _building_with(make: Any) -> Iterator[None]:
    """Lets Megatron call `make` where it builds Adam.

    Megatron 0.16.1 and 0.19 look the class up by these two names of their module, and offer no
    other way to choose it. The state's layout is Adam's.
    """
    names = {"Adam": make, "USING_PYTORCH_OPTIMIZER": False}
    before = {name: getattr(megatron_optimizer, name) for name in names}
    try:
        for name, value in names.items():
            setattr(megatron_optimizer, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(megatron_optimizer, name, value)


def transformer_engine_adam() -> Any:
    """Returns Transformer Engine's Adam, whose averages may have another dtype than the weights.

    Raises:
        UserError: if it cannot run here.
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
    """Gives every parameter the state of a first step, for loading to write into."""
    for part in _parts(optimizer):
        initialize_inner_state(part.optimizer)


def initialize_inner_state(optimizer: Any, config: OptimizerConfig | None = None) -> None:
    """Fills the empty states of our, torch's or Transformer Engine's optimizer."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            if state:
                continue
            if isinstance(optimizer, RMSprop):
                optimizer.initialize_state(param)
                continue
            if not isinstance(optimizer, torch.optim.Adam):
                # Transformer Engine's, which holds no weights of its own here.
                optimizer.initialize_state(param, store_param_remainders=False)
                continue
            if STATE_HOLDS_STEP:
                state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(param.data)
            state["exp_avg_sq"] = torch.zeros_like(param.data)


def _with_bucket_padding(packed: Tensor, buckets: Sequence[Any]) -> Tensor:
    """Returns buckets at their offsets with zeros between, from [sum of unpadded lengths]."""
    last = buckets[-1]
    placed = packed.new_zeros(last.offset + last.numel_unpadded)
    parts = packed.split([bucket.numel_unpadded for bucket in buckets])
    for bucket, part in zip(buckets, parts, strict=True):
        placed[bucket.offset : bucket.offset + len(part)] = part
    return placed


def _parts(optimizer: MegatronOptimizer) -> Iterator[Any]:
    yield from getattr(optimizer, "chained_optimizers", [optimizer])


class _MendedDistributedOptimizer(DistributedOptimizer):
    """Megatron's distributed optimizer with the mends that the module's docstring lists.

    It also knows RMSprop's state, which has no `exp_avg`.
    """

    def get_parameter_state_dp_zero(self, *args: Any, **kwargs: Any) -> Any:
        state = super().get_parameter_state_dp_zero(*args, **kwargs)
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
