"""Five steps with clipping, shuffling and a new epoch, in our training loop and in the oracle's."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field, replace
from typing import Literal

import pytest
from torch import Tensor

from megatron_longpo.config.objective_defaults import OBJECTIVE_DEFAULTS
from megatron_longpo.config.train import (
    DataConfig,
    LoraConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    resolve,
)
from megatron_longpo.data.trees.sampler import PairSampler
from megatron_longpo.engine.metrics import Metrics
from megatron_longpo.reference import run as reference_pass
from megatron_longpo.training import loop
from tests.oracle import oracle_train
from tests.parity.cases import ALL_SHAPES, REFERENCE, Case, RowShape, TinyModel
from tests.parity.harness import (
    RELATIVE,
    Shelf,
    load_policy,
    oracle_settings,
    policy_parameters,
    train_config,
    trained,
)
from tests.parity.peft_adapters import write_b

BATCH, STEPS, LR, EPS, CLIP = 4, 5, 1e-3, 1e-5, 0.05
"""10 pairs: the third step begins the second epoch, and 2 pairs of the first are left out. The
square averages of a rare token are tiny: with a smaller eps rounding would become direction."""
DATA_SEED = 3
METRICS = (
    "step",
    "loss",
    "nll_loss",
    "preference_loss",
    "answer_nll_loss",
    "alignment_loss",
    "divergence_loss",
    "grad_norm",
    "learning_rate",
    "logps/chosen",
    "logps/rejected",
    "reference_logps/chosen",
    "reference_logps/rejected",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """What differs between runs of five steps."""

    optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    distributed: bool = True
    overlap: bool = False
    """Of gradient sums with backward and, with a distributed optimizer, of weights with forward."""
    weight_decay: float = 0.0
    objective: ObjectiveConfig = field(
        default_factory=lambda: ObjectiveConfig(beta=0.1, preference_weight=0.5)
    )
    lora: LoraConfig | None = None
    layers: int = 2
    shapes: tuple[RowShape, ...] = ALL_SHAPES
    share_prefix: bool = True
    recompute: Literal["none", "selective", "full"] = "none"
    dtype: Literal["fp32", "bf16"] = "fp32"
    reference_mode: Literal["online", "cached", "none"] | None = None
    """None = the objective's own."""
    offload: bool = False

    def __str__(self) -> str:
        return self.case.name

    @property
    def case(self) -> Case:
        policy = TinyModel(family="qwen2", tied=not self.distributed, layers=self.layers)
        reference = policy if self.lora is not None else replace(REFERENCE, layers=self.layers)
        mode = self.reference_mode or OBJECTIVE_DEFAULTS[self.objective.name].mode
        digest = zlib.crc32(repr(self).encode())
        return Case(
            name=f"five_steps_{self.optimizer}_{self.objective.name}_{digest:08x}",
            shapes=self.shapes,
            policy=policy,
            reference=None if mode == "none" else reference,
            objective=self.objective,
            share_prefix=self.share_prefix,
            recompute=self.recompute,
            dtype=self.dtype,
            seed=7,
            lora=self.lora,
        )

    def config(self, shelf: Shelf, parallel: ParallelConfig | None = None) -> TrainConfig:
        """The settings of the run."""
        case = self.case
        config = train_config(
            case,
            shelf,
            parallel=parallel,
            data=DataConfig(
                path=shelf.rows_file(case),
                max_length=2000,
                seed=DATA_SEED,
                share_prefix=self.share_prefix,
            ),
            train=RunConfig(global_batch_pairs=BATCH, steps=STEPS, recompute=self.recompute),
            optimizer=OptimizerConfig(
                name=self.optimizer,
                lr=LR,
                lr_schedule="constant",
                warmup_ratio=0.0,
                eps=EPS,
                clip_grad=CLIP,
                weight_decay=self.weight_decay,
                distributed=self.distributed,
                overlap_grad_reduce=self.overlap,
                overlap_param_gather=self.overlap and self.distributed,
            ),
        )
        mode = self.reference_mode or config.reference.mode
        reference = replace(config.reference, mode=mode, offload=self.offload)
        return resolve(replace(config, reference=reference))


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """Metrics of each step, and the policy's weights before and after, by Hugging Face name."""

    metrics: list[Metrics]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def our_steps(steps: Steps, shelf: Shelf, *, parallel: ParallelConfig | None = None) -> History:
    """Five steps on this rank's groups, which `parallel` asks for."""
    config = steps.config(shelf, parallel)
    if config.reference.mode == "cached":
        reference_pass.compute(config)
    run = loop.prepare(config)
    if steps.lora is not None:
        write_b(run)
    before = policy_parameters(run)
    metrics = [loop.train_step(run) for _ in range(STEPS)]
    return History(metrics=metrics, before=before, after=policy_parameters(run))


def oracle_steps(steps: Steps, shelf: Shelf) -> History:
    case = steps.case
    sampler = PairSampler(len(case.rows), global_batch_pairs=BATCH, shuffle=True, seed=DATA_SEED)
    policy = load_policy(shelf, case)
    before = {key: tensor.detach().clone() for key, tensor in trained(policy).items()}
    metrics = oracle_train(
        policy,
        shelf.oracle_reference(case),
        [[case.rows[index] for index in sampler.next_batch()] for _ in range(STEPS)],
        lr=LR,
        optimizer=steps.optimizer,
        weight_decay=steps.weight_decay,
        clip_grad=CLIP,
        eps=EPS,
        **oracle_settings(steps.config(shelf)),
    )
    after = {key: tensor.detach() for key, tensor in trained(policy).items()}
    return History(metrics=metrics, before=before, after=after)


def compare_steps(ours: History, oracle: History) -> None:
    """Raises AssertionError where a metric, or the way a weight has gone, is not the oracle's."""
    norms = [step["grad_norm"] for step in oracle.metrics]
    assert min(norm for norm in norms if norm is not None) > CLIP, "nothing was clipped"
    assert len(ours.metrics) == len(oracle.metrics) == STEPS
    for mine, theirs in zip(ours.metrics, oracle.metrics, strict=True):
        assert mine["consumed_pairs"] == BATCH * int(theirs["step"] or 0)
        for key in METRICS:
            if key not in theirs:
                assert mine.get(key) is None, key
                continue
            assert mine[key] == pytest.approx(theirs[key], rel=RELATIVE), (key, mine["step"])
    for key, before in oracle.before.items():
        assert ours.before[key].equal(before)
        change = oracle.after[key] - before
        difference = ours.after[key] - oracle.after[key]
        assert float(change.norm()) > 0
        assert float(difference.norm()) <= 1e-4 * float(change.norm()), key


@dataclass(frozen=True, kw_only=True, slots=True)
class Differences:
    """How far a run of ours is from the oracle's, as parts of what the oracle has."""

    loss: float
    """Largest of the steps'."""
    grad_norm: float
    """Largest of the steps', before clipping."""
    parameters: float
    """Norm of the difference between both ways that all parameters went, over the oracle's."""


def differences(ours: History, oracle: History) -> Differences:
    """NaN counts as infinitely far."""

    def largest(key: str) -> float:
        parts = [
            abs(_number(mine[key]) - theirs[key]) / abs(theirs[key])
            for mine, theirs in zip(ours.metrics, oracle.metrics, strict=True)
        ]
        return max(part if math.isfinite(part) else math.inf for part in parts)

    squared_difference = squared_change = 0.0
    for key, before in oracle.before.items():
        change = (oracle.after[key] - before).double()
        our_change = (ours.after[key] - ours.before[key]).double()
        squared_difference += float((our_change - change).square().sum())
        squared_change += float(change.square().sum())
    parameters = (squared_difference / squared_change) ** 0.5
    return Differences(
        loss=largest("loss"),
        grad_norm=largest("grad_norm"),
        parameters=parameters if math.isfinite(parameters) else math.inf,
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
