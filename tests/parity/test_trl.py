"""DPO as TRL trains it: the same rows, the same optimizer, five steps side by side."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from trl import DPOConfig

from megatron_longpo.config.train import ObjectiveConfig, OptimizerConfig, RunConfig
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.training import loop
from tests.parity.cases import Case, RowShape, TinyModel
from tests.parity.harness import Shelf, load_hf, policy_parameters, train_config
from tools.peer_trl import TokenRowsTrainer, as_trl_dataset

BATCH, STEPS, LR, BETA = 4, 5, 1e-3, 0.1
# RMS-like denominators amplify rounding where a gradient is next to nothing.
EPS = 1e-5
SHAPES = tuple(
    RowShape(
        prompt_length=20 + 3 * index,
        chosen_answer_lengths=(3 + index % 4,),
        rejected_answer_lengths=(6 - index % 3,),
    )
    for index in range(BATCH * STEPS)
)


def test_five_steps_of_dpo(shelf: Shelf, tmp_path: Path, single_process: Groups) -> None:
    """Policy and reference begin as one model, so the first loss is ln 2 for both."""
    model = TinyModel(family="qwen2", seed=4)
    case = Case(
        name="trl_dpo",
        shapes=SHAPES,
        policy=model,
        reference=model,
        rope_theta=None,
        objective=ObjectiveConfig(name="dpo", beta=BETA),
        seed=11,
    )
    folder = shelf.hf_folder(model)
    policy, reference = load_hf(folder), load_hf(folder)
    trainer = TokenRowsTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=BATCH,
            max_steps=STEPS,
            learning_rate=LR,
            lr_scheduler_type="constant",
            adam_beta1=0.9,
            adam_beta2=0.95,
            adam_epsilon=EPS,
            max_grad_norm=1.0,
            beta=BETA,
            max_length=None,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=as_trl_dataset(case.rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    before = {name: tensor.detach().clone() for name, tensor in policy.named_parameters()}
    trainer.train()

    run = loop.prepare(
        train_config(
            case,
            shelf,
            train=RunConfig(global_batch_pairs=BATCH, steps=STEPS),
            optimizer=OptimizerConfig(
                name="adam", lr=LR, lr_schedule="constant", warmup_ratio=0.0, eps=EPS
            ),
        )
    )
    ours = [loop.train_step(run) for _ in range(STEPS)]

    losses = [float(loss) for loss in trainer.losses]
    margins = [metrics["rewards/margins"] for metrics in trainer.metrics]
    assert ours[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [step["loss"] for step in ours] == pytest.approx(losses, rel=1e-4)
    assert [step["rewards/margins"] for step in ours] == pytest.approx(margins, rel=1e-4, abs=1e-5)
    assert losses[-1] < losses[0] - 0.01, "nothing was learned"
    for name, tensor in policy_parameters(run).items():
        theirs = policy.get_parameter(name).detach()
        change = float((theirs - before[name]).norm())
        assert float((tensor - theirs).norm()) <= 1e-4 * change, name
