"""The config of `longpo train`, one data class a section.

A key of the YAML, an option of the command line and a field here have the same name. What depends
on the objective or on another key is None here. `resolve` (train_checks.py) fills it, so that code
behind it sees no None where contract and docs promise a value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_longpo.config.evaluation import EvaluationConfig
from megatron_longpo.config.fields import limits
from megatron_longpo.config.names import (
    AnswerScope,
    AttentionKernel,
    ContextComm,
    Dtype,
    Layers,
    LoraTarget,
    LrSchedule,
    NllScope,
    ObjectiveName,
    OptimizerName,
    Recompute,
    RecomputeModule,
    ReferenceContext,
    ReferenceMode,
    RowTooLong,
    Turns,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The policy: the model that is trained."""

    hf_path: str
    """Hugging Face folder or hub id of the model to extend."""
    rope_theta: float | None = field(default=None, metadata=limits(above=0))
    """RoPE base of the policy; null = the model's own. The paper used 1e7 for 128K tokens."""
    rope_scaling: dict[str, Any] | None = None
    """RoPE scaling of the policy, written as in an HF config; null = the model's own."""
    max_position_embeddings: int | None = field(default=None, metadata=limits(at_least=1))
    """Number of positions of the policy, written into exported configs; null = the model's own."""
    dtype: Dtype = "bf16"
    """Type of weights and activations in the model; the optimizer keeps fp32 weights."""
    attention_kernel: AttentionKernel = "auto"
    """Attention kernel; auto takes the fastest that works on this machine. fa4 is FlashAttention 4,
    the fastest on Hopper and newer GPUs. te and cudnn use cuDNN; cudnn+te uses cudnn for long
    causal blocks and te for all others."""
    layers: Layers = "auto"
    """te = Transformer Engine's fused layers; local = Megatron's own modules; auto = te on a GPU in
    bf16 if Transformer Engine is installed, else local. Checkpoints are the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceConfig:
    """The frozen reference that the policy is compared with."""

    mode: ReferenceMode | None = None
    """online = scored in the same pass as the policy; cached = read from what longpo reference has
    written; none = no reference, its log-probs count as 0; null = online, or none if the objective
    uses no reference (docs/reference.md)."""
    hf_path: str | None = None
    """Hugging Face folder or hub id; null = model.hf_path. It keeps its own RoPE."""
    context: ReferenceContext | None = None
    """What the reference reads: the short chunk or the long document; null = by objective."""
    cache_path: str | None = None
    """Folder of log-probs for the mode cached; several runs may share it. null =
    logging.dir/reference_logps."""
    offload: bool = False
    """Keep the weights of an online reference in CPU memory between uses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The preference rows to train on."""

    path: str
    """JSONL of rows, a save_to_disk folder, a Parquet folder, or a hub id."""
    split: str | None = None
    """Split of data.path, if that has several (docs/data.md); null = the only one, or train."""
    eval_path: str | None = None
    """Rows to evaluate on, in any of the same forms; null = no evaluation."""
    eval_split: str | None = None
    """Split of data.eval_path; null = the only one, or validation, or else test."""
    max_length: int = field(default=131072, metadata=limits(at_least=2))
    """Maximum tokens of a long row."""
    too_long: RowTooLong = "error"
    """What happens to a longer row: stop with an error, drop the row, or cut the middle of its
    document."""
    pack_tokens: int | None = field(default=None, metadata=limits(at_least=1))
    """Maximum policy tokens of a microbatch, where shared tokens count once; null = the tokens of
    the largest pair."""
    share_prefix: bool = True
    """Compute the tokens that chosen and rejected share only once; false = compute two whole
    rows."""
    shuffle: bool = True
    """Visit the pairs in a new random order in every epoch."""
    seed: int = field(default=42, metadata=limits(at_least=0))
    """Seed of that order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """The loss. A null takes the default of the named objective (docs/settings.md)."""

    name: ObjectiveName = "longpo"
    """Objective to train; docs/objectives.md says when to use which."""
    beta: float | None = field(default=None, metadata=limits(at_least=0))
    """Temperature of the preference term, above 0 if the objective has one; null = by objective."""
    preference_weight: float | None = field(default=None, metadata=limits(at_least=0))
    """Weight of the preference term (the paper's lambda); null = by objective."""
    nll_weight: float | None = field(default=None, metadata=limits(at_least=0))
    """Weight of the next-token loss; null = by objective."""
    nll_scope: NllScope | None = None
    """Tokens of the next-token loss: the whole chosen row or its answers; null = by objective."""
    answer_nll_weight: float = field(default=0.0, metadata=limits(at_least=0))
    """Weight of a second next-token loss, on the chosen answers of a preference objective. It keeps
    these answers likely, including their end tokens."""
    turns: Turns = "summed"
    """summed = one logistic per pair, of the sum over its turns; per_turn = one logistic per turn,
    averaged."""
    label_smoothing: float = field(default=0.0, metadata=limits(at_least=0, below=0.5))
    """Probability that a pair's labels are swapped, as conservative DPO assumes."""
    gamma: float | None = field(default=None, metadata=limits(at_least=0))
    """Margin by which simpo's rewards should differ; null = by objective."""
    alignment_weight: float | None = field(default=None, metadata=limits(at_least=0))
    """Weight of solopo's short-to-long reward alignment (its alpha); null = by objective."""
    divergence_weight: float | None = field(default=None, metadata=limits(at_least=0))
    """Weight of the KL from the policy on the long document to the reference on the short chunk,
    for opsdl and sft_short_to_long; null = by objective."""
    divergence_scope: AnswerScope | None = None
    """Answers on which opsdl takes that KL; null = rejected_answers, which were written from the
    long document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the work is split; data-parallel size = processes / (tensor x pipeline x context)."""

    tensor: int = field(default=1, metadata=limits(at_least=1))
    """Tensor-parallel size: ranks that share every weight matrix; at most the GPUs of a node."""
    pipeline: int = field(default=1, metadata=limits(at_least=1))
    """Pipeline-parallel size."""
    virtual_pipeline: int | None = field(default=None, metadata=limits(at_least=1))
    """Model chunks per pipeline stage; null = as many as pipeline_layout has, or no
    interleaving."""
    pipeline_layout: str | None = None
    """Layers of each stage in Megatron's notation, such as Ettt|tttt|ttL; null = as even as
    possible. E| and |L are stages with only the embedding and only the loss."""
    context: int = field(default=1, metadata=limits(at_least=1))
    """Context-parallel size: ranks that share one sequence."""
    context_comm: ContextComm = "all_gather"
    """How these ranks exchange keys and values: a2a scatters heads; all_gather gathers keys and
    values, with any number of heads; a2a+all_gather scatters heads within groups of neighbouring
    ranks and gathers keys and values across groups."""
    context_inner: int | None = field(default=None, metadata=limits(at_least=1))
    """Ranks of such a group of a2a+all_gather; null = as many as heads and machine allow."""
    sequence: bool | None = None
    """Split norms and dropout over the tensor-parallel ranks; null = true if tensor > 1."""
    timeout_minutes: float = field(default=60.0, metadata=limits(above=0))
    """How long a collective may wait; a first step at 512K tokens takes many minutes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    name: OptimizerName = "rmsprop"
    """Which optimizer."""
    lr: float = field(default=5e-7, metadata=limits(at_least=0))
    """Highest learning rate."""
    weight_decay: float = field(default=0.0, metadata=limits(at_least=0))
    """Weight decay: decoupled in adam, part of the gradient in rmsprop (as in torch)."""
    clip_grad: float = field(default=1.0, metadata=limits(at_least=0))
    """Largest gradient norm; 0 = off."""
    alpha: float = field(default=0.99, metadata=limits(at_least=0, below=1))
    """Decay of rmsprop's average of squared gradients."""
    beta1: float = field(default=0.9, metadata=limits(at_least=0, below=1))
    """Decay of adam's first moment."""
    beta2: float = field(default=0.95, metadata=limits(at_least=0, below=1))
    """Decay of adam's second moment."""
    eps: float = field(default=1e-8, metadata=limits(above=0))
    """Added to the denominator of rmsprop and adam."""
    lr_schedule: LrSchedule = "cosine"
    """Shape of the decay from lr to min_lr after warm-up."""
    warmup_ratio: float = field(default=0.1, metadata=limits(at_least=0, at_most=1))
    """Share of the steps in which the learning rate rises to lr."""
    min_lr: float = field(default=0.0, metadata=limits(at_least=0))
    """End of the decay: the learning rate that a step after the last one would have."""
    distributed: bool = True
    """Shard fp32 weights and optimizer state over the data-parallel ranks."""
    grad_dtype: Dtype = "fp32"
    """Type in which gradients are summed over microbatches and ranks; bf16 takes half the memory
    and rounds every sum."""
    state_dtype: Dtype = "fp32"
    """Type in which the optimizer keeps its averages of gradients; bf16 takes half the memory and
    rounds them. Adam needs Transformer Engine for bf16."""
    overlap_grad_reduce: bool = False
    """Sum gradients over the data-parallel ranks while backward is running."""
    overlap_param_gather: bool = False
    """Gather the sharded optimizer's new weights while the next forward is running."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """How long to train, and what to do during training."""

    global_batch_pairs: int = field(default=8, metadata=limits(at_least=1))
    """Pairs of one optimizer step, over all ranks."""
    epochs: int = field(default=1, metadata=limits(at_least=1))
    """Passes over the data; the last, incomplete global batch is dropped."""
    steps: int | None = field(default=None, metadata=limits(at_least=1))
    """Number of optimizer steps; overrides epochs."""
    seed: int = field(default=42, metadata=limits(at_least=0))
    """Seed of everything except the order of the data."""
    recompute: Recompute = "selective"
    """What backward recomputes instead of storing: none = nothing; selective = recompute_modules;
    all_but_attention = layers without their attention; full = whole layers."""
    recompute_modules: tuple[RecomputeModule, ...] | None = None
    """Modules that selective recomputes; null = layernorm and mlp. core_attn costs most: it doubles
    the attention work of a long row."""
    recompute_layers: int | None = field(default=None, metadata=limits(at_least=1))
    """Number of layers that train.recompute applies to, the first ones of each pipeline stage; the
    others store everything. null = all layers."""
    offload_activations: bool = False
    """Keep what the policy's layers store for backward in CPU memory; not with train.recompute
    selective."""
    eval_interval: int = field(default=0, metadata=limits(at_least=0))
    """Steps between evaluations of data.eval_path and of the section evaluation; 0 = off."""
    eval_at_start: bool = True
    """Also evaluate before the first step (as step 0) and after the last one, if there is something
    to evaluate."""
    dry_run: bool = False
    """Check settings, data and memory, then stop before the first step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints and resuming."""

    dir: str | None = None
    """Folder of checkpoints; null = logging.dir/checkpoints."""
    interval: int = field(default=500, metadata=limits(at_least=0))
    """Steps between checkpoints; 0 = only after the last step."""
    keep: int = field(default=2, metadata=limits(at_least=1))
    """How many checkpoints to keep, the newest ones."""
    async_save: bool = False
    """Write checkpoints while training continues, from a copy in CPU memory."""
    resume: str = "auto"
    """auto = resume from the newest checkpoint in dir; never = refuse a folder that holds a run; a
    path = start from that checkpoint, unless dir has one of this run."""
    load_optimizer: bool = True
    """Load the optimizer state when resuming."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases."""

    project: str
    """Project name."""
    name: str | None = None
    """Run name; null = chosen by wandb."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """offline writes to disk only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """What a run writes."""

    dir: str
    """Folder for config.yaml, metrics.jsonl and tensorboard/."""
    interval: int = field(default=1, metadata=limits(at_least=1))
    """Steps between lines on the console and in trackers; metrics.jsonl has every step."""
    tensorboard: bool = True
    """Write tensorboard/."""
    wandb: WandbConfig | None = None
    """Report to Weights & Biases (project, name, mode); null = off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters, trained instead of the weights (docs/lora.md); null = off, and any of
    these keys turns them on. Set optimizer.lr to 1e-5 to 1e-4 with them."""

    rank: int = field(default=16, metadata=limits(at_least=1))
    """Rank of the adapters."""
    alpha: float = field(default=32.0, metadata=limits(above=0))
    """Scale of the adapters: alpha / rank times their product is added to a weight."""
    targets: tuple[LoraTarget, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    """Layers that get an adapter. linear_qkv = query, key and value; linear_proj = attention
    output; linear_fc1 = gate and up; linear_fc2 = down."""

    @property
    def scale(self) -> float:
        """Factor of the product of the two matrices."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """All settings of `longpo train` and `longpo reference`."""

    model: ModelConfig
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    data: DataConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: RunConfig = field(default_factory=RunConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig
    lora: LoraConfig | None = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
