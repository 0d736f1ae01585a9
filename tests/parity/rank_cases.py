"""What `ranks.py` runs on several ranks: layouts, and the cases that each of them must pass."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, get_args

from megatron_longpo.config.names import ObjectiveName
from megatron_longpo.config.train import ObjectiveConfig, ParallelConfig
from megatron_longpo.parallel.groups import ParallelSizes
from tests.parity.cases import ALL_SHAPES, LORA, ROW_SHAPES, Case, TinyModel
from tests.parity.harness import parallel_config
from tests.parity.steps import Steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Parallel sizes; data parallelism takes the rest of the world."""

    name: str
    sizes: ParallelSizes = field(default_factory=ParallelSizes)
    pipeline_layout: str | None = None

    @property
    def parallel(self) -> ParallelConfig:
        return parallel_config(self.sizes, pipeline_layout=self.pipeline_layout)


def _layout(name: str, pipeline_layout: str | None = None, **sizes: Any) -> Layout:
    full = name if pipeline_layout is None else f"{name} {pipeline_layout}"
    return Layout(name=full, sizes=ParallelSizes(**sizes), pipeline_layout=pipeline_layout)


TP2 = _layout("TP2", tensor=2)
TP2_SP = _layout("TP2+SP", tensor=2, sequence=True)
PP2 = _layout("PP2", pipeline=2)
DP2 = _layout("DP2")
CP2_A2A = _layout("CP2 a2a", context=2, context_inner=2)
CP2 = _layout("CP2 all_gather", context=2)
TP2_PP2 = _layout("TP2xPP2", tensor=2, pipeline=2, sequence=True)
TP2_CP2 = _layout("TP2xCP2", tensor=2, context=2, sequence=True)
TP2_DP2 = _layout("TP2xDP2", tensor=2, sequence=True)
DP2_CP2 = _layout("DP2xCP2", context=2)
CP4_A2A = _layout("CP4 a2a", context=4, context_inner=4)
CP4 = _layout("CP4 all_gather", context=4)
CP4_BOTH = _layout("CP4 a2a+all_gather", context=4, context_inner=2)
INTERLEAVED = _layout("PP2xVPP2", "E|t|t|L", pipeline=2, virtual_pipeline=2)
"""Two layers in four stages; with four ranks, beside data parallelism."""

LAYOUTS = {
    2: (TP2, TP2_SP, PP2, DP2, CP2_A2A, CP2),
    4: (
        TP2_PP2,
        TP2_CP2,
        _layout("PP2xCP2", pipeline=2, context=2),
        DP2_CP2,
        CP4,
        CP4_BOTH,
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
    recompute="all_but_attention",
    recompute_layers=1,
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

DEEP = Case(
    name="ranks-deep",
    shapes=ALL_SHAPES[:5],
    policy=TinyModel(layers=5, tied=True),
    reference=TinyModel(family="qwen2", layers=3, seed=2),
    distributed_optimizer=False,
)
"""Five layers, which no number of stages divides, and a reference with fewer."""

HEADS_28 = Case(
    name="ranks-28_heads",
    shapes=ALL_SHAPES[:3],
    policy=TinyModel(family="qwen3", heads=28, kv_heads=4, head_dim=4),
    reference=None,
    distributed_optimizer=False,
)
"""And 4 key/value heads, as Qwen2.5-7B has."""

EXTRA = {
    2: (
        *((layout, LORA_CASE) for layout in (*LAYOUTS[2], INTERLEAVED)),
        (TP2_SP, LORA_ONE_KV_HEAD),
        (PP2, DEEP),
        (_layout("PP2", "E|tttttL", pipeline=2), DEEP),
        (_layout("PP2xVPP2", pipeline=2, virtual_pipeline=2), DEEP),
        (_layout("PP2xVPP2", "E|ttt|tt|L", pipeline=2, virtual_pipeline=2), DEEP),
        (_layout("PP2xVPP3", "E|t|t|tt|t|L", pipeline=2, virtual_pipeline=3), DEEP),
        *((layout, DIVERGENCE) for layout in (TP2_SP, TP2, PP2, INTERLEAVED, CP2_A2A, CP2)),
        *((layout, SHORT_ROWS) for layout in (PP2, CP2)),
        *((layout, ONE_KV_HEAD) for layout in (CP2_A2A, TP2)),
        (CP2, ODD_HEADS),
    ),
    4: (
        *((layout, LORA_CASE) for layout in LAYOUTS[4]),
        (_layout("PP4", "Et|tt|tt|L", pipeline=4), DEEP),
        (_layout("PP2xVPP2xCP2", pipeline=2, virtual_pipeline=2, context=2), DEEP),
        (
            _layout("TP2xPP2xVPP2", tensor=2, pipeline=2, virtual_pipeline=2, sequence=True),
            DEEP,
        ),
        *((layout, HEADS_28) for layout in (CP4_A2A, CP4_BOTH)),
        *((layout, ONE_KV_HEAD) for layout in (CP4, CP4_BOTH)),
        (CP4, ODD_HEADS),
        (CP4_BOTH, DIVERGENCE),
        (CP4_A2A, CASES[0]),
        *((layout, ANSWERS_OF_ONE_TOKEN) for layout in (CP4, CP4_BOTH)),
        (_layout("TP2xCP2 a2a", tensor=2, context=2, context_inner=2), CASES[2]),
        (TP2_DP2, CASES[0]),
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
    overlapped = Steps(overlap=True)
    if world_size == 4:
        objectives = [
            (TP2_CP2, Steps(objective=ObjectiveConfig(name=name)))
            for name in get_args(ObjectiveName)
        ]
        return [
            (TP2_PP2, tied_rmsprop),
            (DP2_CP2, overlapped),
            (TP2_DP2, overlapped),
            (INTERLEAVED, overlapped),
            *objectives,
            (TP2_PP2, Steps(lora=LORA)),
        ]
    return [
        (TP2_SP, Steps()),
        (PP2, tied_rmsprop),
        (INTERLEAVED, replace(tied_rmsprop, overlap=True)),
        (DP2, Steps()),
        (DP2, Steps(optimizer="adam", weight_decay=0.1)),
        (DP2, overlapped),
        (DP2, replace(tied_rmsprop, overlap=True)),
        (CP2, Steps()),
        (TP2_SP, Steps(lora=LORA)),
        (DP2, Steps(lora=LORA, optimizer="adam")),
        (DP2, Steps(lora=LORA, overlap=True)),
    ]
