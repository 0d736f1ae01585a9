"""The settings of `longpo train`, one dataclass a section.

A key of the YAML, an option of the command line and a field here have the same name. What
depends on the objective or on another key is None here and filled by `resolve`, so that code
behind it sees no None where contract and docs promise a value. Nothing here imports torch: a
mistake is answered before a job is queued.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_longpo.config.evaluation import EvaluationConfig
from megatron_longpo.config.fields import limits
from megatron_longpo.config.names import LoraTarget
from megatron_longpo.config.parser import load_config
from megatron_longpo.config.train_checks import check_world, resolve, resolve_reference

__all__ = ["TrainConfig", "check_world", "load_train_config", "resolve", "resolve_reference"]


ObjectiveName = Literal[
    "longpo",
    "dpo",
    "ipo",
    "simpo",
    "orpo",
    "sft",
    "sft_rejected",
    "sft_short_to_long",
    "solopo_dpo",
    "solopo_simpo",
    "solopo_orpo",
    "opsdl",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The policy, the model that is trained."""

    hf_path: str
    """Hugging Face folder or hub id of the model to extend."""
    rope_theta: float | None = field(default=None, metadata=limits(above=0))
    """RoPE base of the policy; null = the model's own. The paper used 1e7 for 128K tokens."""
    rope_scaling: dict[str, Any] | None = None
    """RoPE scaling of the policy, written as in an HF config; null = the model's own."""
    max_position_embeddings: int | None = field(default=None, metadata=limits(at_least=1))
    """Positions of the policy, kept in exported configs; null = the model's own."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and activations in the model; the optimizer keeps fp32 weights."""
    attention_kernel: Literal["auto", "cudnn+te", "te", "cudnn", "flash_attn", "varlen", "sdpa"] = (
        "auto"
    )
    """Attention kernel; auto takes the fastest that the machine has. te and cudnn are cuDNN's, the
    fast ones from Hopper on; cudnn+te is cudnn for long causal blocks and te for all others."""
    layers: Literal["auto", "te", "local"] = "auto"
    """te = Transformer Engine's fused layers, local = Megatron's own modules; auto = te on a GPU
    in bf16 where Transformer Engine is installed. Checkpoints are the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceConfig:
    """The frozen reference that the preference is measured against."""

    mode: Literal["online", "cached", "none"] | None = None
    """online = scored in the same pass as the policy, cached = read from what longpo reference has
    computed, none = log-probs count as 0; null = online, or none where the objective has no
    reference (docs/reference.md)."""
    hf_path: str | None = None
    """Hugging Face folder or hub id; null = model.hf_path. It keeps its own RoPE."""
    context: Literal["short", "long"] | None = None
    """What the reference reads: the short chunk or the long document; null = by objective."""
    cache_path: str | None = None
    """Folder of log-probs for the mode cached, which several runs may share; null =
    logging.dir/reference_logps."""
    offload: bool = False
    """Keep the weights of an online reference in CPU memory between uses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The preference rows to train on."""

    path: str
    """JSONL of rows, a save_to_disk folder, a Parquet folder, or a hub id."""
    eval_path: str | None = None
    """Rows to evaluate on, in any of the same forms; null = no evaluation."""
    max_length: int = field(default=131072, metadata=limits(at_least=2))
    """Most tokens in a long row."""
    too_long: Literal["error", "drop", "truncate_document"] = "error"
    """What becomes of a longer row: stop, leave it out, or cut the middle of its document."""
    pack_tokens: int | None = field(default=None, metadata=limits(at_least=1))
    """Most physical policy tokens of a microbatch, shared ones once; null = the largest pair."""
    share_prefix: bool = True
    """Compute the tokens that chosen and rejected share once; false = as two whole rows."""
    shuffle: bool = True
    """Visit the pairs in a new random order in every epoch."""
    seed: int = field(default=42, metadata=limits(at_least=0))
    """Seed of that order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """The loss; null values take the default of the named objective (docs/settings.md)."""

    name: ObjectiveName = "longpo"
    """Which objective to train; docs/objectives.md says when to use which."""
    beta: float | None = field(default=None, metadata=limits(at_least=0))
    """Temperature of the preference term, above 0 where there is one; null = by objective."""
    preference_weight: float | None = field(default=None, metadata=limits(at_least=0))
    """Weight of the preference term (the paper's lambda); null = by objective."""
    nll_weight: float | None = field(default=None, metadata=limits(at_least=0))
    """Weight of the next-token loss; null = by objective."""
    nll_scope: Literal["chosen_row", "chosen_answers"] | None = None
    """Tokens of the next-token loss: the whole chosen row or its answers; null = by objective."""
    answer_nll_weight: float = field(default=0.0, metadata=limits(at_least=0))
    """Weight of a further next-token loss, of the chosen answers that a preference compares: it
    keeps them likely, their ends included."""
    turns: Literal["summed", "per_turn"] = "summed"
    """One logistic a pair over the sum of its turns, or one a turn, averaged."""
    label_smoothing: float = field(default=0.0, metadata=limits(at_least=0, below=0.5))
    """Chance that a pair's labels are swapped, as conservative DPO assumes."""
    gamma: float | None = field(default=None, metadata=limits(at_least=0))
    """Margin that simpo's rewards are to differ by; null = by objective."""
    alignment_weight: float | None = field(default=None, metadata=limits(at_least=0))
    """Weight of solopo's short-to-long reward alignment (its alpha); null = by objective."""
    divergence_weight: float | None = field(default=None, metadata=limits(at_least=0))
    """Weight of the KL from the policy on the long document to the reference on the short chunk,
    for opsdl and sft_short_to_long; null = by objective."""
    divergence_scope: Literal["chosen_answers", "rejected_answers"] | None = None
    """Answers along which opsdl takes that KL; null = rejected_answers, what long input wrote."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the work is spread; data parallel = world size / (tensor x pipeline x context)."""

    tensor: int = field(default=1, metadata=limits(at_least=1))
    """Tensor-parallel size: ranks that share every matrix; at most a node's GPUs."""
    pipeline: int = field(default=1, metadata=limits(at_least=1))
    """Pipeline-parallel size."""
    virtual_pipeline: int | None = field(default=None, metadata=limits(at_least=1))
    """Model chunks a pipeline stage; null = no interleaving."""
    pipeline_layout: str | None = None
    """Layers of each stage in Megatron's notation, such as Ettt|tttt|ttL; null = as evenly as
    possible. E| and |L are stages of the embedding and of the loss alone."""
    context: int = field(default=1, metadata=limits(at_least=1))
    """Context-parallel size: ranks that share one sequence."""
    context_comm: Literal["a2a", "all_gather", "a2a+all_gather"] = "all_gather"
    """How those ranks exchange keys and values: heads scattered, keys gathered (any number of
    heads), or heads scattered within groups of neighbours and keys gathered across."""
    context_inner: int | None = field(default=None, metadata=limits(at_least=1))
    """Ranks that a2a+all_gather scatters heads over; null = as many as heads and machine allow."""
    sequence: bool | None = None
    """Split norms and dropout over the tensor-parallel ranks; null = true where tensor > 1."""
    timeout_minutes: float = field(default=60.0, metadata=limits(above=0))
    """How long a collective may wait; a first step at 512K tokens takes many minutes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    name: Literal["rmsprop", "adam"] = "rmsprop"
    """Which optimizer."""
    lr: float = field(default=5e-7, metadata=limits(at_least=0))
    """Highest learning rate."""
    weight_decay: float = field(default=0.0, metadata=limits(at_least=0))
    """Weight decay, decoupled in adam, part of the gradient in rmsprop (as in torch)."""
    clip_grad: float = field(default=1.0, metadata=limits(at_least=0))
    """Largest gradient norm; 0 = off."""
    alpha: float = field(default=0.99, metadata=limits(at_least=0, below=1))
    """Smoothing of rmsprop's square average."""
    beta1: float = field(default=0.9, metadata=limits(at_least=0, below=1))
    """Adam's first-moment decay."""
    beta2: float = field(default=0.95, metadata=limits(at_least=0, below=1))
    """Adam's second-moment decay."""
    eps: float = field(default=1e-8, metadata=limits(above=0))
    """Added to the denominator of rmsprop and adam."""
    lr_schedule: Literal["cosine", "constant", "linear"] = "cosine"
    """Shape of the decay from lr to min_lr after warm-up."""
    warmup_ratio: float = field(default=0.1, metadata=limits(at_least=0, at_most=1))
    """Part of the steps over which the learning rate rises to lr."""
    min_lr: float = field(default=0.0, metadata=limits(at_least=0))
    """Where the decay ends: the learning rate that a step after the last one would have."""
    distributed: bool = True
    """Shard fp32 weights and optimizer state over the data-parallel ranks."""
    grad_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which gradients are summed over microbatches and ranks; bf16 takes half the memory
    and rounds every sum."""
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which the averages of gradients are kept from step to step; bf16 takes half the
    memory and rounds them. Adam needs Transformer Engine for it."""
    overlap_grad_reduce: bool = False
    """Sum gradients over the data-parallel ranks while backward still runs."""
    overlap_param_gather: bool = False
    """Gather the sharded optimizer's new weights while the next forward runs already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """How long to train and what to do along the way."""

    global_batch_pairs: int = field(default=8, metadata=limits(at_least=1))
    """Pairs of one optimizer step, over all ranks."""
    epochs: int = field(default=1, metadata=limits(at_least=1))
    """Passes over the data; the last, incomplete global batch is dropped."""
    steps: int | None = field(default=None, metadata=limits(at_least=1))
    """Optimizer steps; overrides epochs."""
    seed: int = field(default=42, metadata=limits(at_least=0))
    """Seed of everything but the order of the data."""
    recompute: Literal["none", "selective", "all_but_attention", "full"] = "selective"
    """What backward recomputes instead of storing: nothing, some modules, layers without their
    attention, or whole layers."""
    recompute_modules: tuple[Literal["core_attn", "layernorm", "mlp"], ...] | None = None
    """Modules that selective recomputes; null = layernorm and mlp. core_attn, twice the attention
    of a long row, is the dearest of them."""
    recompute_layers: int | None = field(default=None, metadata=limits(at_least=1))
    """Layers of each pipeline stage, the first ones, that train.recompute is for; the others store
    everything. null = all."""
    offload_activations: bool = False
    """Keep what the policy's layers store for backward in CPU memory; not with selective."""
    eval_interval: int = field(default=0, metadata=limits(at_least=0))
    """Steps between evaluations, of data.eval_path and of the section evaluation; 0 = off."""
    eval_at_start: bool = True
    """Where there is something to evaluate, also before the first step (as step 0) and after the
    last."""
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
    """Newest checkpoints to keep."""
    async_save: bool = False
    """Write checkpoints while training goes on, from a copy that the host keeps until then."""
    resume: str = "auto"
    """auto = go on from the newest checkpoint in dir, never = refuse a folder that holds a run,
    or the path of a checkpoint to start from, until dir has newer ones of its own."""
    load_optimizer: bool = True
    """Take optimizer state along when resuming."""


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
    """What a run leaves behind."""

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
    """Train low-rank adapters and not the weights (docs/lora.md); null = off. They want an
    optimizer.lr of 1e-5 to 1e-4."""

    rank: int = field(default=16, metadata=limits(at_least=1))
    """Rank of the adapters."""
    alpha: float = field(default=32.0, metadata=limits(above=0))
    """Their scale; the update is alpha / rank times the product."""
    targets: tuple[LoraTarget, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    """Layers that get an adapter: query, key and value; attention output; gate and up; down."""

    @property
    def scale(self) -> float:
        """Factor of the product of the two matrices."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything `longpo train` can be told."""

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


def load_train_config(argv: list[str]) -> TrainConfig:
    """`--config X.yaml --section.key value ...` -> checked and resolved settings."""
    return resolve(load_config(TrainConfig, argv, command="train"))
