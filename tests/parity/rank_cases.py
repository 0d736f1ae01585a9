"""What `ranks.py` runs on several ranks: layouts, and the cases that each of them must pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from megatron_longpo.config import ObjectiveConfig, ObjectiveName
from megatron_longpo.parallel.groups import ParallelSizes
from tests.parity.cases import ALL_SHAPES, LORA, ROW_SHAPES, Case, TinyModel
from tests.parity.steps import Steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Parallel sizes; data parallelism takes the rest of the world."""

    name: str
    sizes: ParallelSizes = field(default_factory=ParallelSizes)
    comm: Literal["a2a", "all_gather"] = "all_gather"


LAYOUTS = {
    2: (
        Layout(name="TP2", sizes=ParallelSizes(tensor=2)),
        Layout(name="TP2+SP", sizes=ParallelSizes(tensor=2, sequence=True)),
        Layout(name="PP2", sizes=ParallelSizes(pipeline=2)),
        Layout(name="DP2"),
        Layout(name="CP2 a2a", sizes=ParallelSizes(context=2), comm="a2a"),
        Layout(name="CP2 all_gather", sizes=ParallelSizes(context=2)),
    ),
    4: (
        Layout(name="TP2xPP2", sizes=ParallelSizes(tensor=2, pipeline=2, sequence=True)),
        Layout(name="TP2xCP2", sizes=ParallelSizes(tensor=2, context=2, sequence=True)),
        Layout(name="PP2xCP2", sizes=ParallelSizes(pipeline=2, context=2)),
        Layout(name="DP2xCP2", sizes=ParallelSizes(context=2)),
        Layout(name="CP4 all_gather", sizes=ParallelSizes(context=4)),
    ),
}
"""By world size."""


def _both(name: str, policy: TinyModel, reference: TinyModel) -> tuple[Case, Case]:
    shared, two_rows = (
        Case(
            name=f"ranks-{name}-{'shared' if share else 'two_rows'}",
            shapes=ALL_SHAPES[:5],
            policy=policy,
            reference=reference,
            share_prefix=share,
            # Gradients are compared: the distributed optimizer leaves each rank a part of them.
            distributed_optimizer=False,
        )
        for share in (True, False)
    )
    return shared, two_rows


CASES = (
    *_both("llama", TinyModel(kv_heads=2), TinyModel(seed=2, tied=True)),
    *_both(
        "qwen3",
        TinyModel(family="qwen3", tied=True, head_dim=16),
        TinyModel(family="qwen2", seed=2),
    ),
)
"""Each runs under every layout."""

ANSWERS_OF_ONE_TOKEN = Case(
    name="ranks-answers_of_one_token",
    shapes=(ROW_SHAPES["prompt_of_one_token"], *ALL_SHAPES[6:8]),
    objective=ObjectiveConfig(name="sft"),
    reference=None,
    distributed_optimizer=False,
)
"""Few tokens are scored: most context-parallel ranks have none of them."""

ONE_KV_HEAD = Case(
    name="ranks-one_kv_head",
    shapes=ALL_SHAPES[:2],
    policy=TinyModel(kv_heads=1),
    reference=TinyModel(kv_heads=1, seed=2),
    distributed_optimizer=False,
)
"""Fewer key/value heads than ranks."""

ODD_HEADS = Case(
    name="ranks-odd_heads",
    shapes=ALL_SHAPES[:2],
    policy=TinyModel(family="qwen3", heads=3, kv_heads=1, head_dim=8),
    reference=None,
    distributed_optimizer=False,
)
"""Heads that do not divide."""

DIVERGENCE = Case(
    name="ranks-divergence",
    shapes=ALL_SHAPES[:5],
    policy=TinyModel(kv_heads=2, tied=True),
    reference=TinyModel(seed=2),
    objective=ObjectiveConfig(name="opsdl"),
    distributed_optimizer=False,
)
"""A place lies on other ranks in the short row than in the long one."""

SHORT_ROWS = Case(
    name="ranks-short_rows",
    shapes=ALL_SHAPES[:5],
    objective=ObjectiveConfig(name="solopo_dpo"),
    distributed_optimizer=False,
)
"""The policy reads short rows beside the long ones, with gradient."""

LORA_CASE = Case(
    name="ranks-lora",
    shapes=ALL_SHAPES[:5],
    policy=TinyModel(family="qwen2", tied=True),
    reference=TinyModel(family="qwen2", tied=True),
    distributed_optimizer=False,
    recompute="full",
    lora=LORA,
)
"""Runs under every layout too."""

LORA_ONE_KV_HEAD = Case(
    name="ranks-lora_one_kv_head",
    shapes=ALL_SHAPES[:2],
    policy=TinyModel(kv_heads=1),
    reference=TinyModel(kv_heads=1),
    distributed_optimizer=False,
    lora=LORA,
)

EXTRA = {
    2: (
        *((layout, LORA_CASE) for layout in LAYOUTS[2]),
        (Layout(name="TP2+SP", sizes=ParallelSizes(tensor=2, sequence=True)), LORA_ONE_KV_HEAD),
        (Layout(name="TP2+SP", sizes=ParallelSizes(tensor=2, sequence=True)), DIVERGENCE),
        (Layout(name="TP2", sizes=ParallelSizes(tensor=2)), DIVERGENCE),
        (Layout(name="PP2", sizes=ParallelSizes(pipeline=2)), DIVERGENCE),
        (Layout(name="CP2 a2a", sizes=ParallelSizes(context=2), comm="a2a"), DIVERGENCE),
        (Layout(name="CP2 all_gather", sizes=ParallelSizes(context=2)), DIVERGENCE),
        (Layout(name="PP2", sizes=ParallelSizes(pipeline=2)), SHORT_ROWS),
        (Layout(name="CP2 all_gather", sizes=ParallelSizes(context=2)), SHORT_ROWS),
        (Layout(name="CP2 a2a", sizes=ParallelSizes(context=2), comm="a2a"), ONE_KV_HEAD),
        (Layout(name="TP2", sizes=ParallelSizes(tensor=2)), ONE_KV_HEAD),
        (Layout(name="CP2 all_gather", sizes=ParallelSizes(context=2)), ODD_HEADS),
    ),
    4: (
        *((layout, LORA_CASE) for layout in LAYOUTS[4]),
        (Layout(name="CP4 a2a", sizes=ParallelSizes(context=4), comm="a2a"), CASES[0]),
        (Layout(name="CP4 all_gather", sizes=ParallelSizes(context=4)), ANSWERS_OF_ONE_TOKEN),
        (
            Layout(name="TP2xCP2 a2a", sizes=ParallelSizes(tensor=2, context=2), comm="a2a"),
            CASES[2],
        ),
    ),
}
"""Further pairs of a layout and a case, by world size."""


def rank_runs(world_size: int) -> list[tuple[Layout, Case]]:
    """All that `ranks.py` runs at a world size."""
    grid = [(layout, case) for layout in LAYOUTS[world_size] for case in CASES]
    return [*grid, *EXTRA[world_size]]


def step_runs(world_size: int) -> list[tuple[Layout, Steps]]:
    """Runs of five steps, with the optimizer's state sharded over data-parallel ranks."""
    tied_rmsprop = Steps(distributed=False, weight_decay=0.1)
    if world_size == 4:
        layouts = {layout.name: layout for layout in LAYOUTS[4]}
        objectives = [
            (layouts["TP2xCP2"], Steps(objective=ObjectiveConfig(name=name)))
            for name in get_args(ObjectiveName)
        ]
        return [
            (layouts["TP2xPP2"], tied_rmsprop),
            (layouts["DP2xCP2"], Steps()),
            *objectives,
            (layouts["TP2xPP2"], Steps(lora=LORA)),
        ]
    layouts = {layout.name: layout for layout in LAYOUTS[2]}
    return [
        (layouts["TP2+SP"], Steps()),
        (layouts["PP2"], tied_rmsprop),
        (layouts["DP2"], Steps()),
        (layouts["DP2"], Steps(optimizer="adam", weight_decay=0.1)),
        (layouts["CP2 all_gather"], Steps()),
        (layouts["TP2+SP"], Steps(lora=LORA)),
        (layouts["DP2"], Steps(lora=LORA, optimizer="adam")),
    ]
