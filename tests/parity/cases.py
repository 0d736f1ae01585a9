"""What the parity tests run: models, rows and settings of one optimizer step, as plain data.

A `Case` says nothing of processes or parallel sizes, so that the same case can be run in one
process and on many ranks and must give the same numbers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from megatron_longpo.config.train import LoraConfig, ObjectiveConfig
from megatron_longpo.data.rows.schema import PreferenceRow
from tests.random_rows import random_row

VOCAB = 300

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""Short original positions, so that rows of a hundred tokens reach all three ranges."""

YARN_SCALING = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 8.0,
    "truncate": False,
}
"""With an attention factor of 1.14."""

LINEAR_SCALING = {"rope_type": "linear", "factor": 2.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyModel:
    """A model folder by what is in it; see tools/tiny_models.py."""

    family: str = "llama"
    tied: bool = False
    seed: int = 1
    layers: int = 2
    head_dim: int | None = None
    """None = hidden size / heads."""
    heads: int = 4
    kv_heads: int = 2
    vocab_size: int = VOCAB
    rope_theta: float = 10000.0
    scaling: tuple[tuple[str, Any], ...] = ()
    """Items of rope_scaling; empty = plain RoPE."""


REFERENCE = TinyModel(seed=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowShape:
    """A pair of rows by its lengths; see tests/random_rows.py."""

    common_prefix_length: int | None = None
    """None = the prompt."""
    prompt_length: int = 40
    chosen_answer_lengths: tuple[int, ...] = (5,)
    rejected_answer_lengths: tuple[int, ...] = (4,)
    chunk_lengths: tuple[int, ...] | None = None
    question_length: int = 2
    trailing_length: int = 0


ROW_SHAPES = {
    "one_turn": RowShape(),
    "three_turns": RowShape(
        chosen_answer_lengths=(4, 1, 6), rejected_answer_lengths=(3, 5, 2), chunk_lengths=(9, 4, 7)
    ),
    "nothing_shared": RowShape(common_prefix_length=0, prompt_length=20),
    "one_token_shared": RowShape(common_prefix_length=1, prompt_length=20),
    "prompt_of_one_token": RowShape(prompt_length=1),
    "shared_into_answers": RowShape(
        common_prefix_length=43, chosen_answer_lengths=(7, 2), rejected_answer_lengths=(8, 4)
    ),
    # The second answers begin at different tokens of the shared part.
    "shared_past_an_answer": RowShape(
        common_prefix_length=48, chosen_answer_lengths=(3, 6), rejected_answer_lengths=(5, 7)
    ),
    "row_within_a_row": RowShape(
        common_prefix_length=43, chosen_answer_lengths=(3,), rejected_answer_lengths=(6,)
    ),
    "identical_rows": RowShape(
        common_prefix_length=45, chosen_answer_lengths=(5,), rejected_answer_lengths=(5,)
    ),
    "tokens_after_answers": RowShape(
        trailing_length=3, chosen_answer_lengths=(2, 2), rejected_answer_lengths=(1, 6)
    ),
}
ALL_SHAPES = tuple(ROW_SHAPES.values())
FEW_SHAPES = (
    ROW_SHAPES["one_turn"],
    ROW_SHAPES["three_turns"],
    ROW_SHAPES["nothing_shared"],
    ROW_SHAPES["shared_into_answers"],
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One optimizer step. What is left out is LongPO with both terms large enough to see."""

    name: str
    shapes: tuple[RowShape, ...] = FEW_SHAPES
    """One pair each; together the global batch."""
    policy: TinyModel = field(default_factory=TinyModel)
    reference: TinyModel | None = REFERENCE
    """None = `reference.mode` none."""
    rope_theta: float | None = 50000.0
    """`model.rope_theta`: the policy's own override."""
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    """Items of `model.rope_scaling`; empty = the policy's own."""
    objective: ObjectiveConfig = field(
        default_factory=lambda: ObjectiveConfig(beta=0.1, preference_weight=0.5)
    )
    reference_context: Literal["short", "long"] | None = None
    share_prefix: bool = True
    pack_tokens: int | None = None
    """None = the largest pair: most microbatches hold one or two pairs."""
    recompute: Literal["none", "selective", "all_but_attention", "full"] = "none"
    recompute_modules: tuple[Literal["core_attn", "layernorm", "mlp"], ...] | None = None
    recompute_layers: int | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"
    distributed_optimizer: bool = True
    seed: int = 0
    lora: LoraConfig | None = None
    """Adapters on the policy; their B is not 0, so that both matrices have a gradient."""

    def __str__(self) -> str:
        return self.name

    @property
    def rows(self) -> list[PreferenceRow]:
        """The global batch, the same for the same seed."""
        rng = np.random.default_rng(self.seed)
        vocab_size = self.policy.vocab_size
        if self.reference is not None:
            vocab_size = min(vocab_size, self.reference.vocab_size)
        return [
            random_row(rng, vocab_size, **asdict(shape), id=f"pair{index}")
            for index, shape in enumerate(self.shapes)
        ]


ONE_PACK = 10_000
"""A budget that all pairs of any case fit into."""


def _family_cases() -> list[Case]:
    cases = []
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        for tied in (False, True):
            name = f"{family}-{'tied' if tied else 'untied'}"
            # Wider heads than hidden / heads, as Qwen3 and Mistral Nemo have.
            head_dim = 16 if tied else None
            policy = TinyModel(family=family, tied=tied, head_dim=head_dim)
            reference = TinyModel(family=family, tied=not tied, seed=2)
            for share in (True, False):
                cases.append(
                    Case(
                        name=f"{name}-{'shared' if share else 'two_rows'}",
                        policy=policy,
                        reference=reference,
                        share_prefix=share,
                    )
                )
    return cases


FAMILY_CASES = _family_cases()

SHAPE_CASES = [
    Case(name=name, shapes=(shape,), policy=TinyModel(family="qwen2"))
    for name, shape in ROW_SHAPES.items()
]

PACKING_CASES = [
    Case(name="largest_pair", shapes=ALL_SHAPES),
    Case(name="one_pack", shapes=ALL_SHAPES, pack_tokens=ONE_PACK),
    Case(name="one_pack_of_two_rows", shapes=ALL_SHAPES, pack_tokens=ONE_PACK, share_prefix=False),
]

MODEL_CASES = [
    Case(
        name="llama3_scaling",
        policy=TinyModel(scaling=tuple(LLAMA3_SCALING.items())),
        reference=TinyModel(seed=2, scaling=tuple(LLAMA3_SCALING.items())),
    ),
    Case(name="llama3_scaling_asked_for", rope_scaling=tuple(LLAMA3_SCALING.items())),
    Case(name="linear_scaling", rope_scaling=tuple(LINEAR_SCALING.items()), rope_theta=None),
    Case(
        name="yarn_scaling_asked_for",
        rope_scaling=tuple(YARN_SCALING.items()),
        reference=TinyModel(family="qwen3", seed=2, scaling=tuple(YARN_SCALING.items())),
    ),
    Case(
        name="linear_reference",
        reference=TinyModel(family="qwen3", seed=3, scaling=tuple(LINEAR_SCALING.items())),
    ),
    Case(
        name="reference_of_another_shape",
        reference=TinyModel(
            family="mistral",
            seed=5,
            layers=3,
            kv_heads=4,
            head_dim=4,
            rope_theta=500.0,
            vocab_size=290,
        ),
    ),
    Case(name="one_kv_head", policy=TinyModel(kv_heads=1), reference=TinyModel(kv_heads=1, seed=2)),
    Case(name="no_padding_rows", policy=TinyModel(vocab_size=384)),
    Case(name="plain_optimizer", distributed_optimizer=False),
    Case(name="recompute_selective", recompute="selective", policy=TinyModel(family="qwen3")),
    Case(
        name="recompute_core_attn",
        recompute="selective",
        recompute_modules=("core_attn",),
        policy=TinyModel(family="qwen2"),
    ),
    Case(
        name="recompute_norms",
        recompute="selective",
        recompute_modules=("layernorm",),
        policy=TinyModel(family="qwen3"),
    ),
    Case(
        name="recompute_all_modules",
        recompute="selective",
        recompute_modules=("core_attn", "layernorm", "mlp"),
    ),
    Case(
        name="recompute_all_but_attention",
        recompute="all_but_attention",
        policy=TinyModel(family="qwen2"),
    ),
    Case(name="recompute_full", recompute="full", policy=TinyModel(family="qwen2")),
    Case(name="recompute_full_tied", recompute="full", policy=TinyModel(tied=True)),
]

OBJECTIVE_CASES = [
    Case(name="longpo_as_published", objective=ObjectiveConfig()),
    Case(
        name="longpo_per_turn",
        objective=ObjectiveConfig(beta=0.1, preference_weight=0.5, turns="per_turn"),
    ),
    Case(
        name="longpo_smoothed",
        objective=ObjectiveConfig(beta=0.1, preference_weight=0.5, label_smoothing=0.2),
    ),
    Case(
        name="longpo_nll_of_answers",
        objective=ObjectiveConfig(beta=0.1, preference_weight=0.5, nll_scope="chosen_answers"),
    ),
    Case(
        name="longpo_with_nll_of_answers_too",
        objective=ObjectiveConfig(beta=0.1, preference_weight=0.5, answer_nll_weight=0.3),
    ),
    Case(
        name="longpo_without_nll",
        objective=ObjectiveConfig(beta=0.1, preference_weight=1.0, nll_weight=0.0),
    ),
    Case(name="longpo_nll_alone", objective=ObjectiveConfig(preference_weight=0.0)),
    Case(
        name="longpo_long_reference",
        reference_context="long",
        objective=ObjectiveConfig(beta=0.1, preference_weight=0.5),
    ),
    Case(name="longpo_without_reference", reference=None),
    Case(name="longpo_same_model", reference=TinyModel()),
    Case(name="dpo", objective=ObjectiveConfig(name="dpo")),
    Case(
        name="dpo_per_turn_smoothed",
        objective=ObjectiveConfig(name="dpo", turns="per_turn", label_smoothing=0.1),
    ),
    Case(
        name="dpo_short_reference",
        reference_context="short",
        objective=ObjectiveConfig(name="dpo", nll_weight=0.3),
    ),
    Case(name="ipo", objective=ObjectiveConfig(name="ipo")),
    Case(
        name="ipo_per_turn_with_nll",
        objective=ObjectiveConfig(name="ipo", turns="per_turn", nll_weight=0.3),
    ),
    Case(name="simpo", reference=None, objective=ObjectiveConfig(name="simpo")),
    Case(
        name="simpo_per_turn_smoothed",
        reference=None,
        objective=ObjectiveConfig(name="simpo", turns="per_turn", label_smoothing=0.1),
    ),
    Case(name="orpo", reference=None, objective=ObjectiveConfig(name="orpo")),
    Case(
        name="orpo_per_turn",
        reference=None,
        objective=ObjectiveConfig(name="orpo", turns="per_turn", nll_weight=0.0),
    ),
    Case(name="solopo_dpo", objective=ObjectiveConfig(name="solopo_dpo")),
    Case(
        name="solopo_dpo_per_turn_two_rows",
        share_prefix=False,
        objective=ObjectiveConfig(name="solopo_dpo", turns="per_turn", nll_weight=0.2),
    ),
    Case(
        name="solopo_simpo",
        reference=None,
        objective=ObjectiveConfig(name="solopo_simpo", turns="per_turn"),
    ),
    Case(name="solopo_orpo", reference=None, objective=ObjectiveConfig(name="solopo_orpo")),
    Case(name="opsdl", objective=ObjectiveConfig(name="opsdl"), pack_tokens=ONE_PACK),
    Case(
        name="opsdl_tied_chosen",
        policy=TinyModel(tied=True),
        reference=TinyModel(family="qwen3", seed=3, head_dim=16),
        share_prefix=False,
        objective=ObjectiveConfig(name="opsdl", divergence_scope="chosen_answers"),
    ),
    Case(name="sft_short_to_long", objective=ObjectiveConfig(name="sft_short_to_long")),
    Case(
        name="sft_long_to_long",
        reference_context="long",
        objective=ObjectiveConfig(name="sft_short_to_long", nll_weight=0.0, divergence_weight=1.0),
    ),
    Case(name="sft", reference=None, objective=ObjectiveConfig(name="sft")),
    Case(
        name="sft_of_the_row",
        reference=None,
        objective=ObjectiveConfig(name="sft", nll_scope="chosen_row", nll_weight=0.7),
    ),
    Case(name="sft_rejected", reference=None, objective=ObjectiveConfig(name="sft_rejected")),
]

LORA = LoraConfig(rank=3, alpha=8.0)


def _lora_case(name: str, **settings: Any) -> Case:
    """The reference is the policy's own base, unless `settings` say otherwise."""
    policy = settings.pop("policy", TinyModel(family="qwen2"))
    return Case(
        name=f"lora-{name}",
        **{"policy": policy, "reference": policy, "lora": LORA, **settings},
    )


LORA_CASES = [
    _lora_case("qwen2"),
    _lora_case("qwen3-tied", policy=TinyModel(family="qwen3", tied=True, head_dim=16)),
    _lora_case("two_rows", share_prefix=False, policy=TinyModel()),
    _lora_case("recompute_selective", recompute="selective"),
    _lora_case("recompute_full", recompute="full"),
    _lora_case("recompute_first", recompute="full", recompute_layers=1),
    # In the first layer nothing before the MLP trains.
    _lora_case(
        "mlp_recomputed",
        recompute="selective",
        lora=LoraConfig(rank=2, alpha=2.0, targets=("linear_fc1", "linear_fc2")),
    ),
    _lora_case("queries_alone", lora=LoraConfig(rank=1, alpha=0.5, targets=("linear_qkv",))),
    _lora_case("another_reference", reference=REFERENCE),
    _lora_case("without_reference", reference=None),
    _lora_case("sft", reference=None, objective=ObjectiveConfig(name="sft")),
    _lora_case("plain_optimizer", distributed_optimizer=False),
    _lora_case("opsdl", objective=ObjectiveConfig(name="opsdl")),
    _lora_case("solopo_dpo", objective=ObjectiveConfig(name="solopo_dpo")),
]

CASES = [
    *FAMILY_CASES,
    *SHAPE_CASES,
    *PACKING_CASES,
    *MODEL_CASES,
    *OBJECTIVE_CASES,
    *LORA_CASES,
]
