"""Five steps with clipping, shuffling and a new epoch, in our training loop and in the oracle's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest
from torch import Tensor

from megatron_longpo.config import (
    DataConfig,
    LoraConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
)
from megatron_longpo.config_objectives import OBJECTIVE_DEFAULTS
from megatron_longpo.data.sampler import PairSampler
from megatron_longpo.training import loop
from megatron_longpo.training.metrics import Metrics
from tests.oracle import oracle_train
from tests.parity.cases import ALL_SHAPES, REFERENCE, Case, TinyModel
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
WITHOUT_REFERENCE = [name for name, of in OBJECTIVE_DEFAULTS.items() if of.mode == "none"]
METRICS = (
    "step",
    "loss",
    "nll_loss",
    "preference_loss",
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

    def __str__(self) -> str:
        return self.case.name

    @property
    def case(self) -> Case:
        policy = TinyModel(family="qwen2", tied=not self.distributed)
        reference = REFERENCE if self.lora is None else policy
        kind = self.objective.name if self.lora is None else f"{self.objective.name}_lora"
        return Case(
            name=f"five_steps_{self.optimizer}_{self.distributed}_{kind}",
            shapes=ALL_SHAPES,
            policy=policy,
            reference=None if self.objective.name in WITHOUT_REFERENCE else reference,
            objective=self.objective,
            seed=7,
            lora=self.lora,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """Metrics of each step, and the policy's weights before and after, by Hugging Face name."""

    metrics: list[Metrics]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def our_steps(steps: Steps, shelf: Shelf, *, parallel: ParallelConfig | None = None) -> History:
    case = steps.case
    config = train_config(
        case,
        shelf,
        parallel=parallel,
        data=DataConfig(path=shelf.rows_file(case), max_length=2000, seed=DATA_SEED),
        train=RunConfig(global_batch_pairs=BATCH, steps=STEPS),
        optimizer=OptimizerConfig(
            name=steps.optimizer,
            lr=LR,
            lr_schedule="constant",
            warmup_ratio=0.0,
            eps=EPS,
            clip_grad=CLIP,
            weight_decay=steps.weight_decay,
            distributed=steps.distributed,
            overlap_grad_reduce=steps.overlap,
            overlap_param_gather=steps.overlap and steps.distributed,
        ),
    )
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
        **oracle_settings(train_config(case, shelf)),
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
