"""Makes Megatron's optimizer and learning-rate schedule from the section `optimizer`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_longpo.config import train as train_config
from megatron_longpo.model.spec import DTYPES
from megatron_longpo.training.megatron_optimizer import build_optimizer, transformer_engine_adam


def check_optimizer(config: train_config.OptimizerConfig) -> None:
    """Raises a UserError for an optimizer that this machine cannot run."""
    if config.name == "adam" and config.state_dtype != "fp32":
        transformer_engine_adam()


def make_optimizer(
    config: train_config.OptimizerConfig, model: Sequence[Any], *, bf16: bool
) -> MegatronOptimizer:
    """Returns the optimizer over the model's trainable parameters.

    Weight decay does not apply to biases and norms, as in Megatron and transformers.
    """
    megatron_config = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=config.distributed,
        # The norm is logged whether or not it clips: an infinite limit never does.
        clip_grad=config.clip_grad or math.inf,
    )
    rmsprop_alpha = config.alpha if config.name == "rmsprop" else None
    return build_optimizer(
        megatron_config, model, rmsprop_alpha=rmsprop_alpha, state_dtype=DTYPES[config.state_dtype]
    )


def make_scheduler(
    config: train_config.OptimizerConfig, optimizer: MegatronOptimizer, *, num_steps: int
) -> OptimizerParamScheduler:
    """Returns the schedule of `num_steps` steps: linear warm-up from 0, then the named decay.

    As in transformers, step k (from 0) runs at the schedule's value at k: with a warm-up the
    first step has learning rate 0.
    """
    warmup_steps = min(math.ceil(config.warmup_ratio * num_steps), num_steps - 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.lr if config.lr_schedule == "constant" else config.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=num_steps,
        lr_decay_style=config.lr_schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=False,
    )


def current_learning_rate(optimizer: MegatronOptimizer) -> float:
    """Returns the learning rate of the next step."""
    return float(optimizer.param_groups[0]["lr"])
