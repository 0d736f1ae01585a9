"""How pairs are put into microbatches is nobody's business but the scheduler's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_longpo.data.trees.packing import make_pack
from megatron_longpo.engine.batches import rank_packs
from megatron_longpo.engine.schedule import MetricSums, run_microbatches
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.parallel.layout import RankPack, lay_out_pack
from megatron_longpo.training import loop
from tests.parity.cases import ALL_SHAPES, ONE_PACK, REFERENCE, Case, TinyModel
from tests.parity.harness import Shelf, oracle_for, policy_gradients, run_case, train_config


def lay_out_pairs(
    run: loop.Run, microbatches: Sequence[Sequence[int]], *, is_filler: bool = False
) -> list[RankPack]:
    return [
        lay_out_pack(
            make_pack([run.pairs.trees(pair) for pair in pairs], is_filler=is_filler),
            multiple=1,
            device=run.groups.device,
        )
        for pairs in microbatches
    ]


def step(run: loop.Run, packs: list[RankPack]) -> tuple[MetricSums, dict[str, Tensor]]:
    for chunk in run.model:
        chunk.train()
        chunk.zero_grad_buffer()
    read_sums = run_microbatches(run.model, packs, run.objective, run.groups, forward_only=False)
    return read_sums(), policy_gradients(run)


@pytest.fixture(scope="module")
def run(shelf: Shelf, single_process: Groups) -> loop.Run:
    case = Case(name="layouts", shapes=ALL_SHAPES, pack_tokens=ONE_PACK)
    return loop.prepare(train_config(case, shelf))


def test_fillers_change_nothing_to_the_last_bit(run: loop.Run) -> None:
    batch = lay_out_pairs(run, [[0, 1, 2], [3, 4]])
    fillers = lay_out_pairs(run, [[6], [2]], is_filler=True)
    expected_sums, expected = step(run, batch)
    # In training they come last; their place must not matter either.
    for packs in ([*batch, *fillers], [fillers[0], batch[0], fillers[1], batch[1]]):
        sums, gradients = step(run, packs)
        assert sums == expected_sums and sums["pairs"] == 5
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert sum(float(gradient.norm()) for gradient in expected.values()) > 0


def test_the_budget_decides_the_number_of_microbatches(run: loop.Run) -> None:
    """What the packing cases of test_one_step.py rely on."""
    pairs = list(range(len(ALL_SHAPES)))

    def packs(budget_tokens: int) -> list[RankPack]:
        return rank_packs(
            run.pairs,
            pairs,
            run.groups,
            budget_tokens=budget_tokens,
        )

    assert len(packs(ONE_PACK)) == 1
    assert 3 <= len(packs(run.pairs.largest_pair_tokens)) < len(pairs)


def test_one_microbatch_or_many_is_the_same_step(run: loop.Run) -> None:
    pairs = range(len(ALL_SHAPES))
    sums, gradients = step(run, lay_out_pairs(run, [pairs]))
    norm = sum(float(gradient.norm()) ** 2 for gradient in gradients.values()) ** 0.5
    for microbatches in (
        [[9, 3, 0, 1, 8], [2, 7, 6, 5, 4]],
        [[9, 3, 0], [1, 8], [2, 7, 6], [5, 4]],
        [[pair] for pair in pairs],
    ):
        other_sums, other = step(run, lay_out_pairs(run, microbatches))
        assert other_sums == pytest.approx(sums, rel=1e-6, abs=1e-5)
        for name, gradient in gradients.items():
            assert float((gradient - other[name]).norm()) <= 1e-6 * norm, name


def test_gradients_of_bf16_weights_add_up_in_fp32(shelf: Shelf, single_process: Groups) -> None:
    """Ten microbatches' gradient is the sum of theirs to fp32's rounding, not bf16's."""
    case = Case(name="layouts_bf16", shapes=ALL_SHAPES, pack_tokens=ONE_PACK, dtype="bf16")
    run = loop.prepare(train_config(case, shelf))
    trained = [parameter for chunk in run.model for parameter in chunk.module.parameters()]
    trained = [parameter for parameter in trained if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.bfloat16}
    assert {parameter.main_grad.dtype for parameter in trained} == {torch.float32}
    pairs = range(len(ALL_SHAPES))
    _, whole = step(run, lay_out_pairs(run, [[pair] for pair in pairs]))
    alone = [step(run, lay_out_pairs(run, [[pair]]))[1] for pair in pairs]
    norm = sum(float(gradient.norm()) ** 2 for gradient in whole.values()) ** 0.5
    for name, gradient in whole.items():
        mean = torch.stack([gradients[name].double() for gradients in alone]).mean(0)
        assert float((gradient - mean).norm()) <= 1e-6 * norm, name
    assert norm > 0


@pytest.mark.parametrize(
    "modules",
    [("core_attn",), ("layernorm",), ("mlp",), ("core_attn", "layernorm", "mlp"), None],
    ids=lambda modules: "+".join(modules or ("default",)),
)
def test_selective_recomputes_what_is_named(
    modules: tuple[Any, ...] | None, shelf: Shelf, single_process: Groups
) -> None:
    case = Case(
        name="layouts_recompute",
        pack_tokens=ONE_PACK,
        reference=None,
        recompute="selective",
        recompute_modules=modules,
    )
    run = loop.prepare(train_config(case, shelf))
    (model,) = unwrap_model(run.model)
    layer = model.policy.decoder.layers[0]
    watched = {
        "core_attn": [layer.self_attention.core_attention],
        "layernorm": [layer.input_layernorm, layer.pre_mlp_layernorm],
        "mlp": [layer.mlp],
    }
    calls: Counter[nn.Module] = Counter()
    for module in chain(*watched.values()):
        module.register_forward_hook(lambda module, *_: calls.update([module]))
    loop.train_step(run)
    for name, of_name in watched.items():
        times = 2 if name in (modules or ("layernorm", "mlp")) else 1
        assert [calls[module] for module in of_name] == [times] * len(of_name), name


@pytest.mark.parametrize(
    ("recompute", "modules", "watched"),
    [
        ("selective", None, ("mlp", "input_layernorm")),
        ("selective", ("core_attn",), ("self_attention.core_attention",)),
        ("all_but_attention", None, ("mlp", "self_attention.linear_qkv")),
        ("full", None, ("mlp", "self_attention.core_attention")),
    ],
    ids=["selective", "core_attn", "all_but_attention", "full"],
)
def test_the_last_layers_may_stay_whole(
    recompute: Any,
    modules: Any,
    watched: tuple[str, ...],
    shelf: Shelf,
    single_process: Groups,
) -> None:
    """Only the first two are run again, and no gradient changes in its last bit."""
    kept = Case(name="layouts_first", policy=TinyModel(layers=3), reference=None)
    first = replace(kept, recompute=recompute, recompute_modules=modules, recompute_layers=2)
    runs = [loop.prepare(train_config(case, shelf)) for case in (kept, first)]
    counts, losses = [], []
    for run in runs:
        (model,) = unwrap_model(run.model)
        calls: Counter[int] = Counter()
        for index, layer in enumerate(model.policy.decoder.layers):
            for name in watched:
                module = layer.get_submodule(name)
                module.register_forward_hook(lambda *_, i=index, c=calls: c.update([i]))
        losses.append(loop.train_step(run)["loss"])
        counts.append([calls[index] for index in range(3)])
    assert losses[0] == losses[1]
    once = counts[0][0]
    assert once > len(watched), "there are several microbatches"
    assert counts == [[once, once, once], [2 * once, 2 * once, once]]
    expected, actual = (policy_gradients(run) for run in runs)
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name


@pytest.mark.parametrize("recompute", ["none", "selective", "all_but_attention", "full"])
def test_bf16_stays_near_the_oracle(recompute: str, shelf: Shelf, single_process: Groups) -> None:
    case = Case(
        name=f"bf16_{recompute}",
        dtype="bf16",
        recompute=recompute,  # type: ignore[arg-type]
        policy=TinyModel(family="qwen2", tied=True),
        reference=REFERENCE,
    )
    ours, oracle = run_case(case, shelf, single_process), oracle_for(case, shelf)
    for key in ("loss", "nll_loss", "logps/chosen", "logps/rejected", "reference_logps/rejected"):
        assert ours.metrics[key] == pytest.approx(oracle.metrics[key], rel=5e-3), key
    squared_difference = sum(
        float((ours.gradients[name] - expected).norm()) ** 2
        for name, expected in oracle.gradients.items()
    )
    assert squared_difference**0.5 <= 0.03 * oracle.grad_norm
