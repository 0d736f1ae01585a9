"""Names of Megatron-LM and ms-swift beside ours, and the answer to an unknown key.

docs/megatron_flags.md shows the same table; a test holds them equal.
"""

from __future__ import annotations

from collections.abc import Collection

from megatron_longpo.errors import nearest

MEGATRON_FLAGS = {
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "num_layers_per_virtual_pipeline_stage": "parallel.virtual_pipeline",
    "num_virtual_stages_per_pipeline_rank": "parallel.virtual_pipeline",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "pipeline_model_parallel_layout": "parallel.pipeline_layout",
    "decoder_first_pipeline_num_layers": "parallel.pipeline_layout",
    "decoder_last_pipeline_num_layers": "parallel.pipeline_layout",
    "account_for_embedding_in_pipeline_split": "parallel.pipeline_layout",
    "account_for_loss_in_pipeline_split": "parallel.pipeline_layout",
    "context_parallel_size": "parallel.context",
    "cp_comm_type": "parallel.context_comm",
    "hierarchical_context_parallel_sizes": "parallel.context_inner",
    "sequence_parallel": "parallel.sequence",
    "distributed_timeout_minutes": "parallel.timeout_minutes",
    "micro_batch_size": "data.pack_tokens",
    "global_batch_size": "train.global_batch_pairs",
    "seq_length": "data.max_length",
    "data_path": "data.path",
    "train_data_path": "data.path",
    "valid_data_path": "data.eval_path",
    "train_iters": "train.steps",
    "train_samples": "train.steps",
    "eval_interval": "train.eval_interval",
    "recompute_granularity": "train.recompute",
    "recompute_activations": "train.recompute",
    "recompute_modules": "train.recompute_modules",
    "recompute_num_layers": "train.recompute_layers",
    "recompute_method": "train.recompute_layers",
    "cpu_offloading": "train.offload_activations",
    "fine_grained_activation_offloading": "train.offload_activations",
    "optimizer": "optimizer.name",
    "use_distributed_optimizer": "optimizer.distributed",
    "use_precision_aware_optimizer": "optimizer.state_dtype",
    "exp_avg_dtype": "optimizer.state_dtype",
    "exp_avg_sq_dtype": "optimizer.state_dtype",
    "overlap_grad_reduce": "optimizer.overlap_grad_reduce",
    "overlap_param_gather": "optimizer.overlap_param_gather",
    "lr_decay_style": "optimizer.lr_schedule",
    "lr_warmup_fraction": "optimizer.warmup_ratio",
    "lr_warmup_iters": "optimizer.warmup_ratio",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.eps",
    "load": "checkpoint.resume",
    "save": "checkpoint.dir",
    "save_interval": "checkpoint.interval",
    "async_save": "checkpoint.async_save",
    "no_load_optim": "checkpoint.load_optimizer",
    "log_interval": "logging.interval",
    "tensorboard_dir": "logging.tensorboard",
    "wandb_project": "logging.wandb.project",
    "wandb_exp_name": "logging.wandb.name",
    "rotary_base": "model.rope_theta",
    "rotary_scaling_factor": "model.rope_scaling",
    "use_rope_scaling": "model.rope_scaling",
    "bf16": "model.dtype",
    "attention_backend": "model.attention_kernel",
}
"""Megatron-LM's names, most of which ms-swift shares, in lower case with underscores."""

SWIFT_FLAGS = {
    "model_name_or_path": "model.hf_path",
    "torch_dtype": "model.dtype",
    "attn_impl": "model.attention_kernel",
    "ref_model": "reference.hf_path",
    "ref_load": "reference.hf_path",
    "dataset": "data.path",
    "val_dataset": "data.eval_path",
    "truncation_strategy": "data.too_long",
    "packing": "data.pack_tokens",
    "dataset_shuffle": "data.shuffle",
    "data_seed": "data.seed",
    "rlhf_type": "objective.name",
    "loss_type": "objective.name",
    "rpo_alpha": "objective.answer_nll_weight",
    "sequence_parallel_size": "parallel.context",
    "ddp_timeout": "parallel.timeout_minutes",
    "per_device_train_batch_size": "data.pack_tokens",
    "gradient_accumulation_steps": "train.global_batch_pairs",
    "num_train_epochs": "train.epochs",
    "max_epochs": "train.epochs",
    "max_steps": "train.steps",
    "eval_steps": "train.eval_interval",
    "gradient_checkpointing": "train.recompute",
    "learning_rate": "optimizer.lr",
    "lr_scheduler_type": "optimizer.lr_schedule",
    "max_grad_norm": "optimizer.clip_grad",
    "output_dir": "logging.dir",
    "logging_steps": "logging.interval",
    "report_to": "logging.wandb",
    "save_steps": "checkpoint.interval",
    "save_total_limit": "checkpoint.keep",
    "resume_from_checkpoint": "checkpoint.resume",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "target_modules": "lora.targets",
}
"""ms-swift's own names, and those that it has from the Hugging Face trainers."""


def suggestion(unknown: str, keys: Collection[str]) -> str:
    """Returns what to write instead of an unknown key, as a sentence.

    `keys` are the keys of the command. A name of Megatron or ms-swift is only offered if it leads
    to one of them.
    """
    name = unknown.lower().replace("-", "_")
    leaf = name.rpartition(".")[2]
    same_leaf = [key for key in keys if key.rpartition(".")[2] == leaf]
    if same_leaf:
        return f"Did you mean {' or '.join(same_leaf)}?"
    for flags, source in ((MEGATRON_FLAGS, "Megatron-LM"), (SWIFT_FLAGS, "ms-swift")):
        if flags.get(leaf) in keys:
            return f"{source}'s {leaf} is {flags[leaf]} here"
    flags = {flag: key for flag, key in {**SWIFT_FLAGS, **MEGATRON_FLAGS}.items() if key in keys}
    leaves = {key.rpartition(".")[2]: key for key in keys}
    close = nearest(name, keys) or nearest(leaf, [*leaves, *flags])
    if close is None:
        return "See --help for the keys there are"
    return f"The nearest is {leaves.get(close) or flags.get(close) or close}"
