"""Policy and reference in one module: who trains, who is saved, and that order does not matter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.utils import unwrap_model
from torch import Tensor

from checkpoints_convert.gpt_weights import load_hf_weights
from checkpoints_convert.hf_to_megatron import NoAttention
from megatron_longpo.config.train import OptimizerConfig
from megatron_longpo.data.trees.packing import make_pack
from megatron_longpo.engine.pair_sums import sum_pairs
from megatron_longpo.model.head.final_states import FinalStates
from megatron_longpo.model.longpo_model import LongPOModel
from megatron_longpo.model.spec import build_gpt, transformer_config
from megatron_longpo.objectives import PairLogps
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.parallel.layout import RankPack, lay_out_pack
from megatron_longpo.training import loop
from tests.parity.cases import ALL_SHAPES, Case, TinyModel
from tests.parity.harness import Shelf, policy_parameters, train_config

CASE = Case(
    name="longpo_model",
    shapes=ALL_SHAPES,
    policy=TinyModel(family="qwen3"),
    reference=TinyModel(family="qwen2", seed=2),
)


@pytest.fixture(scope="module")
def run(shelf: Shelf, single_process: Groups) -> loop.Run:
    optimizer = OptimizerConfig(lr=1e-2, lr_schedule="constant", warmup_ratio=0.0)
    return loop.prepare(train_config(CASE, shelf, optimizer=optimizer))


def model_of(run: loop.Run) -> LongPOModel:
    (model,) = unwrap_model(run.model)
    assert isinstance(model, LongPOModel)
    return model


def pack_of(run: loop.Run, pairs: Sequence[int]) -> RankPack:
    trees = [run.pairs.trees(pair) for pair in pairs]
    return lay_out_pack(make_pack(trees), device=run.groups.device)


def pair_logps(run: loop.Run, pairs: Sequence[int]) -> PairLogps:
    pack = pack_of(run, pairs)
    with torch.no_grad():
        logps: Tensor = model_of(run)(pack)
    return sum_pairs(logps, pack, context_group=run.groups.context)


def tensors_of(logps: PairLogps) -> dict[str, Tensor]:
    """By field, and by row where the field has rows."""
    found: dict[str, Tensor] = {}
    for field in dataclasses.fields(logps):
        value = getattr(logps, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value
        else:
            found |= {f"{field.name} {row}": tensor for row, tensor in value.items()}
    assert len(found) == 2 + 2 + 2 + 5
    return found


def test_a_pairs_sums_do_not_depend_on_its_place(run: loop.Run) -> None:
    pairs = list(range(len(ALL_SHAPES)))
    expected = pair_logps(run, pairs)
    for order in (pairs[::-1], [3, 7, 0, 9, 1, 8, 2, 6, 5, 4]):
        actual = pair_logps(run, order)
        found, wanted = tensors_of(actual), tensors_of(expected)
        assert found.keys() == wanted.keys()
        for name, whole in wanted.items():
            torch.testing.assert_close(found[name], whole[order], rtol=1e-6, atol=1e-5)
    for index in (1, 4):
        alone = pair_logps(run, [index])
        turns = alone.turn_mask_NT.shape[1]
        torch.testing.assert_close(
            alone.policy["long_rejected"][0],
            expected.policy["long_rejected"][index, :turns],
            rtol=1e-6,
            atol=1e-5,
        )


def test_a_caller_may_bring_its_own_head(run: loop.Run) -> None:
    """It gets the pack and both models' final states with their output layers."""
    model, pack = model_of(run), pack_of(run, [0, 1])
    seen: list[FinalStates] = []

    def head(asked: RankPack, policy: FinalStates, reference: FinalStates | None) -> Tensor:
        assert asked is pack and reference is not None
        seen.extend((policy, reference))
        return policy.whole()[:3]

    with torch.no_grad():
        output = model(pack, head)
    policy, reference = seen
    assert pack.reference is not None and model.reference is not None
    assert len(policy.whole()) == pack.policy.num_tokens
    assert len(reference.whole()) == pack.reference.num_tokens
    assert torch.equal(output, policy.whole()[:3])
    assert policy.output_layer().weight is model.output_weight()
    assert reference.output_layer().weight is model.reference.output_layer.weight
    assert policy.output_layer().shard.num_valid == run.sources.policy.vocab_size


def test_the_reference_reads_its_own_weights_and_rope(run: loop.Run) -> None:
    model = model_of(run)
    chunks = model._chunks
    assert chunks["policy"] is not None and chunks["reference"] is not None
    assert not torch.equal(chunks["policy"].inv_freq, chunks["reference"].inv_freq)
    assert "self_attention.q_layernorm" in str(list(model.policy.state_dict()))
    assert model.reference is not None
    assert "self_attention.q_layernorm" not in str(list(model.reference.state_dict()))


def test_only_the_policy_trains(run: loop.Run) -> None:
    model = model_of(run)
    assert model.reference is not None
    assert all(parameter.requires_grad for parameter in model.policy.parameters())
    assert not any(parameter.requires_grad for parameter in model.reference.parameters())
    optimized = sum(
        parameter.numel() for group in run.optimizer.param_groups for parameter in group["params"]
    )
    assert optimized == sum(parameter.numel() for parameter in model.policy.parameters())

    before = {
        name: tensor.clone()
        for name, tensor in model.reference.state_dict().items()
        if isinstance(tensor, Tensor)
    }
    policy_before = policy_parameters(run)
    for _ in range(2):
        loop.train_step(run)
    after = model.reference.state_dict()
    assert before and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in model.reference.parameters())
    assert not any(hasattr(parameter, "main_grad") for parameter in model.reference.parameters())
    changed = policy_parameters(run)
    assert not any(torch.equal(changed[name], tensor) for name, tensor in policy_before.items())


def test_the_reference_stays_in_eval_mode(run: loop.Run) -> None:
    model = model_of(run)
    assert model.reference is not None
    for mode in (True, False, True):
        assert run.model[0].train(mode) is run.model[0]
        assert model.policy.training is mode
        assert not any(module.training for module in model.reference.modules())


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoint_keys_are_a_plain_gpt_models(
    tied: bool, shelf: Shelf, single_process: Groups
) -> None:
    case = Case(name=f"keys_{tied}", policy=TinyModel(family="qwen2", tied=tied))
    run = loop.prepare(train_config(case, shelf))
    arch = run.sources.policy
    plain = build_gpt(arch, transformer_config(arch, dtype="fp32"), core_attention=NoAttention)
    load_hf_weights(plain, arch, run.sources.policy_folder)
    ours = stored_tensors(model_of(run).sharded_state_dict())
    theirs = stored_tensors(plain.sharded_state_dict())
    assert set(ours) == set(theirs) and "embedding.word_embeddings.weight@(0, 0)" in ours
    for key, expected in theirs.items():
        assert ours[key].global_shape == expected.global_shape
        assert torch.equal(ours[key].data, expected.data), key


def stored_tensors(state: dict[str, Any]) -> dict[str, ShardedTensor]:
    """What dist_checkpointing would store, by the key it would store it under."""
    apply_factories(state)
    return {
        f"{value.key}@{value.global_offset}": value
        for value in nested_values(state)
        if isinstance(value, ShardedTensor)
    }


def test_a_pack_without_reference_rows_scores_the_policy_alone(
    shelf: Shelf, single_process: Groups
) -> None:
    run = loop.prepare(train_config(Case(name="no_reference", reference=None), shelf))
    model, pack = model_of(run), pack_of(run, [0, 1])
    assert model.reference is None and pack.reference is None
    logps = model(pack)
    assert logps.shape == pack.policy.edges.sources.shape and logps.dtype == torch.float32
    assert (logps < 0).all()


def test_reference_rows_without_a_reference_are_a_mistake_of_ours(
    run: loop.Run, shelf: Shelf, single_process: Groups
) -> None:
    without = loop.prepare(train_config(Case(name="no_reference", reference=None), shelf))
    with pytest.raises(AssertionError, match="there is no reference model"):
        model_of(without)(pack_of(run, [0]))
