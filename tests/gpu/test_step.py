"""A bf16 step on a GPU: against the fp32 oracle, and Transformer Engine's layers against ours."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_longpo.config.train import CheckpointConfig, LoggingConfig, OptimizerConfig, RunConfig
from megatron_longpo.engine.batches import rank_packs
from megatron_longpo.engine.schedule import run_microbatches
from megatron_longpo.model.layer_specs import choose_layers
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.training import loop
from tests.gpu.steps import CASES, TOLERANCE, Bf16Shelf, check_step, gradient_error, run_step
from tests.model.offloaded_steps import small_blocks
from tests.parity.cases import Case
from tests.parity.harness import oracle_for, policy_parameters, train_config

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="session")
def bf16_shelf(tmp_path_factory: pytest.TempPathFactory) -> Bf16Shelf:
    return Bf16Shelf(tmp_path_factory.mktemp("bf16-shelf"))


def need_transformer_engine() -> None:
    chosen = choose_layers(
        "auto", device=torch.device("cuda"), dtype=torch.bfloat16, has_lora=False
    )
    if chosen.kind != "te":
        pytest.skip(chosen.line)


@pytest.mark.parametrize("layers", ["te", "local"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_the_oracles(
    case: Case, layers: str, bf16_shelf: Bf16Shelf, single_process: Groups
) -> None:
    if layers == "te":
        need_transformer_engine()
    ours = run_step(case, bf16_shelf, single_process, layers=layers)
    check_step(ours, oracle_for(case, bf16_shelf))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_kinds_of_layers_give_one_gradient(
    case: Case, bf16_shelf: Bf16Shelf, single_process: Groups
) -> None:
    need_transformer_engine()
    te, local = (
        run_step(case, bf16_shelf, single_process, layers=layers) for layers in ("te", "local")
    )
    assert te.metrics["loss"] == pytest.approx(local.metrics["loss"], rel=TOLERANCE)
    assert gradient_error(te.gradients, local.gradients) <= TOLERANCE


@contextmanager
def waits_are_errors() -> Iterator[None]:
    """Whatever makes the CPU wait for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_a_step_waits_for_the_gpu_at_its_end_alone(
    case: Case, recompute: Any, bf16_shelf: Bf16Shelf, single_process: Groups
) -> None:
    """Forward and backward of two microbatches, and the update, are queued at one go."""
    need_transformer_engine()
    run = loop.prepare(train_config(replace(case, recompute=recompute), bf16_shelf))
    loop.train_step(run)  # compiles, and makes what is made once
    for chunk in run.model:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    with waits_are_errors():
        packs = rank_packs(run.pairs, [0], run.groups, budget_tokens=run.budget_tokens)
        packs += rank_packs(run.pairs, [1], run.groups, budget_tokens=run.budget_tokens)
        read_sums = run_microbatches(
            run.model, packs, run.objective, run.groups, forward_only=False
        )
        _, grad_norm, _ = run.optimizer.step()
    with pytest.raises(RuntimeError, match="synchroniz"), waits_are_errors():
        read_sums()
    assert math.isfinite(float(grad_norm))


@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("recompute", ["selective", "all_but_attention", "full"])
def test_recomputation_changes_little(
    recompute: Any, layers: int | None, bf16_shelf: Bf16Shelf, single_process: Groups
) -> None:
    """The same kernels run again; only sums in another order may differ."""
    case = CASES[1]
    kept = run_step(case, bf16_shelf, single_process)
    again = run_step(
        replace(case, recompute=recompute, recompute_layers=layers), bf16_shelf, single_process
    )
    assert gradient_error(again.gradients, kept.gradients) <= 5e-3


@pytest.mark.parametrize("recompute", ["none", "all_but_attention", "full"])
def test_offloaded_activations_change_nothing(
    recompute: Any, bf16_shelf: Bf16Shelf, single_process: Groups
) -> None:
    case = replace(CASES[1], recompute=recompute)
    kept = run_step(case, bf16_shelf, single_process)
    with small_blocks():
        moved = run_step(case, bf16_shelf, single_process, train={"offload_activations": True})
    assert moved.metrics["loss"] == kept.metrics["loss"]
    assert gradient_error(moved.gradients, kept.gradients) <= 1e-3


@pytest.mark.parametrize(("first", "second"), [("te", "local"), ("local", "te")])
def test_a_checkpoint_goes_on_with_the_other_kind_of_layers(
    first: str, second: str, bf16_shelf: Bf16Shelf, single_process: Groups, tmp_path: Path
) -> None:
    need_transformer_engine()
    case = CASES[2]

    def config(layers: str, steps: int) -> Any:
        made = train_config(
            case,
            bf16_shelf,
            optimizer=OptimizerConfig(lr=1e-3, warmup_ratio=0.0),
            train=RunConfig(global_batch_pairs=2, steps=steps, recompute="none"),
            checkpoint=CheckpointConfig(interval=1),
            logging=LoggingConfig(dir=str(tmp_path / first), tensorboard=False),
        )
        return replace(made, model=replace(made.model, layers=layers))

    saved = loop.prepare(config(first, 2))
    loop.train(saved)
    resumed = loop.prepare(config(second, 4))
    assert resumed.step == 2
    before, after = policy_parameters(saved), policy_parameters(resumed)
    assert set(before) == set(after)
    for name, weight in before.items():
        assert torch.equal(weight, after[name]), name
    loop.train(resumed)
    assert resumed.step == 4
