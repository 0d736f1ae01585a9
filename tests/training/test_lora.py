"""A run with adapters: what trains, what the reference is, what is saved, and resuming."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from checkpoints_convert.hf_to_megatron import run_import
from checkpoints_convert.lora_record import LORA_NAME
from checkpoints_convert.torch_dist import TorchDistReader
from megatron_longpo.config.convert import ImportConfig
from megatron_longpo.config.train import LoraConfig, ObjectiveConfig, TrainConfig
from megatron_longpo.errors import StopRequested, UserError
from megatron_longpo.model.longpo_model import LongPOModel
from megatron_longpo.runtime import stop
from megatron_longpo.training import loop
from tests.parity.cases import LORA, Case, TinyModel
from tests.parity.gather import gathered
from tests.parity.harness import Shelf, policy_parameters
from tests.training.short_runs import CASE, POLICY, metric_rows, short_config

pytestmark = pytest.mark.usefixtures("single_process", "own_signal_handlers")

LORA_RUN = replace(CASE, name="short_lora_runs", reference=POLICY, lora=LORA)


def run_to_end(config: TrainConfig) -> loop.Run:
    run = loop.prepare(config)
    loop.train(run)
    return run


def run_until_stopped(config: TrainConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = loop.prepare(config)
    with monkeypatch.context() as patch:
        patch.setattr(stop, "was_requested", lambda: run.step == step)
        with pytest.raises(StopRequested):
            loop.train(run)


def model_of(run: loop.Run) -> LongPOModel:
    (model,) = unwrap_model(run.model)
    assert isinstance(model, LongPOModel)
    return model


def base_weights(run: loop.Run) -> dict[str, Tensor]:
    return gathered(run, lambda parameter: parameter)


def test_only_adapters_train_and_hold_state(shelf: Shelf, tmp_path: Path) -> None:
    run = loop.prepare(short_config(shelf, tmp_path, case=LORA_RUN))
    model = model_of(run)
    adapters = {n: p for n, p in model.named_parameters() if ".adapter.lora_" in n}
    assert len(adapters) == 2 * len(LORA.targets) * POLICY.layers
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapters)
    optimized = sum(p.numel() for group in run.optimizer.param_groups for p in group["params"])
    assert optimized == sum(p.numel() for p in adapters.values())

    before, base_before = policy_parameters(run), base_weights(run)
    loop.train(run)
    after, base_after = policy_parameters(run), base_weights(run)
    assert all(torch.equal(base_after[name], tensor) for name, tensor in base_before.items())
    assert not any(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_one_model_is_in_memory_unless_the_reference_is_another(
    shelf: Shelf, tmp_path: Path
) -> None:
    model = model_of(loop.prepare(short_config(shelf, tmp_path, case=LORA_RUN)))
    base = sum(p.numel() for n, p in model.named_parameters() if ".adapter." not in n)
    policy = sum(p.numel() for n, p in model.policy.named_parameters() if ".adapter." not in n)
    assert model.reference is None and base == policy
    other = replace(LORA_RUN, name="lora_other_reference", reference=CASE.reference)
    model = model_of(loop.prepare(short_config(shelf, tmp_path, case=other)))
    assert model.reference is not None
    assert not any(p.requires_grad for p in model.reference.parameters())


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_dpo_starts_at_ln_2(recompute: str, shelf: Shelf, tmp_path: Path) -> None:
    """B is 0 and the reference is the base: they say the same until the first update."""
    case = replace(
        LORA_RUN, name="lora_dpo", objective=ObjectiveConfig(name="dpo"), rope_theta=None
    )
    config = short_config(
        shelf,
        tmp_path,
        case=case,
        steps=4,
        train={"recompute": recompute},
        optimizer={"lr": 1e-2, "warmup_ratio": 0.0},
    )
    run_to_end(config)
    first, *_, last = metric_rows(tmp_path)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["reference_logps/chosen"] == pytest.approx(first["logps/chosen"], abs=1e-4)
    assert abs(last["rewards/margins"]) > 1e-3


def test_the_reference_keeps_the_bases_rope(shelf: Shelf, tmp_path: Path) -> None:
    changed = replace(LORA_RUN, objective=ObjectiveConfig(name="dpo"), rope_theta=50000.0)
    (row,) = metric_rows_of(shelf, tmp_path / "changed", changed)
    assert abs(row["loss"] - math.log(2)) > 1e-4
    own = replace(changed, rope_theta=None)
    (own_row,) = metric_rows_of(shelf, tmp_path / "own", own)
    assert row["reference_logps/chosen"] == own_row["reference_logps/chosen"]


def metric_rows_of(shelf: Shelf, folder: Path, case: Case) -> list[dict[str, Any]]:
    run_to_end(short_config(shelf, folder, case=case, steps=1))
    return metric_rows(folder)


@pytest.mark.parametrize(
    ("name", "distributed", "dtype"),
    [("rmsprop", True, "fp32"), ("adam", False, "bf16"), ("adam", True, "bf16")],
)
def test_stopped_and_resumed_is_the_same_run(
    name: str,
    distributed: bool,
    dtype: str,
    shelf: Shelf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def config(folder: str) -> TrainConfig:
        return short_config(
            shelf,
            tmp_path / folder,
            steps=5,
            case=replace(LORA_RUN, dtype=dtype),  # type: ignore[arg-type]
            optimizer={"name": name, "distributed": distributed, "weight_decay": 0.01},
        )

    straight = run_to_end(config("straight"))
    run_until_stopped(config("resumed"), 2, monkeypatch)
    resumed = loop.prepare(config("resumed"))
    assert resumed.step == 2
    loop.train(resumed)
    assert metric_rows(tmp_path / "resumed") == metric_rows(tmp_path / "straight")
    expected = policy_parameters(straight)
    actual = policy_parameters(resumed)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_a_checkpoint_holds_adapters_alone(shelf: Shelf, tmp_path: Path) -> None:
    run_to_end(short_config(shelf, tmp_path, case=LORA_RUN, steps=1))
    checkpoint = tmp_path / "checkpoints" / "iter_0000001"
    reader = TorchDistReader(checkpoint)
    names = {key for key in reader.keys if not key.startswith(("optimizer.", "rng"))}
    parts = {
        "linear_qkv": "self_attention",
        "linear_proj": "self_attention",
        "linear_fc1": "mlp",
        "linear_fc2": "mlp",
    }
    assert names == {
        f"decoder.layers.{part}.{target}.adapter.{leaf}"
        for target, part in parts.items()
        for leaf in ("lora_a", "lora_b")
    }
    key = "decoder.layers.mlp.linear_fc1.adapter.lora_b"
    assert reader.shape(key) == (POLICY.layers, 96, LORA.rank)
    # The optimizer's state, too: nothing there is as long as a matrix of the base.
    state = [key for key in reader.keys if key.startswith("optimizer.")]
    assert state and all(math.prod(reader.shape(key)) <= 96 * LORA.rank for key in state)


REFUSED = [
    ({"lora": replace(LORA, rank=4)}, r"lora\.rank \(4\): .* was saved with 3"),
    ({"lora": replace(LORA, alpha=1.5)}, r"lora\.alpha \(1\.5\): .* was saved with 8"),
    (
        {"lora": replace(LORA, targets=("linear_fc2",))},
        r"lora\.targets \(linear_fc2\): .* was saved with linear_qkv, linear_proj",
    ),
    ({"lora": None}, r"it has adapters alone, and lora is null; set lora as it was \(rank 3"),
    (
        {"policy": replace(POLICY, seed=5)},
        r"model\.hf_path \(.*\): its weights are not those that the adapters of .* trained on",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_other_adapters_or_another_base_are_refused(
    change: dict[str, Any], message: str, shelf: Shelf, tmp_path: Path
) -> None:
    run_to_end(short_config(shelf, tmp_path, case=LORA_RUN, steps=1))
    config = short_config(shelf, tmp_path, case=replace(LORA_RUN, **change))
    with pytest.raises(UserError, match=message) as caught:
        loop.prepare(config)
    assert "\n" not in str(caught.value)


def test_the_order_of_targets_and_the_place_of_the_base_are_free(
    shelf: Shelf, tmp_path: Path
) -> None:
    run_to_end(short_config(shelf, tmp_path, case=LORA_RUN, steps=1))
    moved = shutil.copytree(shelf.hf_folder(POLICY), tmp_path / "moved")
    config = short_config(
        shelf, tmp_path, case=replace(LORA_RUN, lora=replace(LORA, targets=LORA.targets[::-1]))
    )
    config = replace(
        config,
        model=replace(config.model, hf_path=str(moved)),
        reference=replace(config.reference, hf_path=f"{moved}/"),
    )
    run = loop.prepare(config)
    assert run.step == 1 and model_of(run).reference is None


def test_whole_weights_are_refused_for_adapters(shelf: Shelf, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoints")
    run_import(ImportConfig(source=shelf.hf_folder(POLICY), destination=folder))
    with pytest.raises(UserError, match=r"it has whole weights, and lora is set; export it"):
        loop.prepare(short_config(shelf, tmp_path, case=LORA_RUN))


def test_a_damaged_record_is_named(shelf: Shelf, tmp_path: Path) -> None:
    run_to_end(short_config(shelf, tmp_path, case=LORA_RUN, steps=1))
    (tmp_path / "checkpoints" / "iter_0000001" / LORA_NAME).write_text('{"rank": 3')
    with pytest.raises(UserError, match=r"lora\.json: not a record of adapters"):
        loop.prepare(short_config(shelf, tmp_path, case=LORA_RUN))


def test_adapters_of_one_run_start_alike_and_of_another_seed_do_not(
    shelf: Shelf, tmp_path: Path
) -> None:
    def a_of(seed: int) -> dict[str, Tensor]:
        two_layers = replace(LORA_RUN, policy=TinyModel(family="qwen2"), reference=None)
        config = short_config(shelf, tmp_path, case=two_layers, train={"seed": seed})
        everything = policy_parameters(loop.prepare(config))
        assert not any(tensor.any() for name, tensor in everything.items() if "lora_B" in name)
        return {name: tensor for name, tensor in everything.items() if "lora_A" in name}

    first, again, other = a_of(1), a_of(1), a_of(2)
    assert len(first) == 8
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    firsts = [tensor.flatten()[0].item() for tensor in first.values()]
    assert len(set(firsts)) == len(firsts), "two adapters began with the same numbers"


def test_rank_one_on_one_layer_trains(shelf: Shelf, tmp_path: Path) -> None:
    lora = LoraConfig(rank=1, alpha=1.0, targets=("linear_proj",))
    run = run_to_end(short_config(shelf, tmp_path, case=replace(LORA_RUN, lora=lora), steps=2))
    assert len(policy_parameters(run)) == 2
