"""Five steps with clipping, shuffling and a new epoch end at the oracle's weights."""

from __future__ import annotations

import pytest

from megatron_longpo.config import DataConfig, OptimizerConfig, RunConfig
from megatron_longpo.data.sampler import PairSampler
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.training import loop
from tests.oracle import oracle_train
from tests.parity.cases import ALL_SHAPES, Case, TinyModel
from tests.parity.harness import (
    RELATIVE,
    Shelf,
    load_policy,
    oracle_settings,
    policy_parameters,
    train_config,
)

BATCH, STEPS, LR = 4, 5, 1e-3
METRICS = (
    "step",
    "loss",
    "nll_loss",
    "preference_loss",
    "grad_norm",
    "learning_rate",
    "logps/chosen",
    "logps/rejected",
    "reference_logps/chosen",
    "reference_logps/rejected",
)


@pytest.mark.parametrize(
    ("name", "distributed", "weight_decay"),
    [("rmsprop", True, 0.0), ("rmsprop", False, 0.1), ("adam", True, 0.1), ("adam", False, 0.0)],
)
def test_weights_after_five_steps_are_the_oracles(
    name: str, distributed: bool, weight_decay: float, shelf: Shelf, single_process: Groups
) -> None:
    case = Case(
        name=f"five_steps_{name}_{distributed}",
        shapes=ALL_SHAPES,
        policy=TinyModel(family="qwen2", tied=not distributed),
        seed=7,
    )
    # 10 pairs: the third step begins the second epoch, and 2 pairs of the first were left out.
    config = train_config(
        case,
        shelf,
        data=DataConfig(path=shelf.rows_file(case), max_length=2000, seed=3),
        train=RunConfig(global_batch_pairs=BATCH, steps=STEPS),
        optimizer=OptimizerConfig(
            name=name,  # type: ignore[arg-type]
            lr=LR,
            lr_schedule="constant",
            warmup_ratio=0.0,
            # The square averages of a rare token are tiny: rounding must not become direction.
            eps=1e-5,
            clip_grad=0.5,
            weight_decay=weight_decay,
            distributed=distributed,
        ),
    )
    sampler = PairSampler(len(case.rows), global_batch_pairs=BATCH, shuffle=True, seed=3)
    batches = [[case.rows[index] for index in sampler.next_batch()] for _ in range(STEPS)]
    policy = load_policy(shelf, case)
    before = {key: tensor.detach().clone() for key, tensor in policy.named_parameters()}
    objective = oracle_settings(config)
    expected = oracle_train(
        policy,
        shelf.oracle_reference(case),
        batches,
        lr=LR,
        optimizer=name,
        weight_decay=weight_decay,
        clip_grad=0.5,
        eps=1e-5,
        **objective,
    )

    run = loop.prepare(config)
    start = policy_parameters(run)
    history = [loop.train_step(run) for _ in range(STEPS)]

    assert min(step["grad_norm"] for step in expected) > 0.5, "nothing was clipped"
    for ours, theirs in zip(history, expected, strict=True):
        assert ours["consumed_pairs"] == BATCH * int(theirs["step"])
        for key in METRICS:
            assert ours[key] == pytest.approx(theirs[key], rel=RELATIVE), (key, ours["step"])
    after = policy_parameters(run)
    for key, theirs_after in policy.named_parameters():
        assert start[key].equal(before[key])
        change = theirs_after.detach() - before[key]
        difference = after[key] - theirs_after.detach()
        assert float(change.norm()) > 0
        assert float(difference.norm()) <= 1e-4 * float(change.norm()), key
