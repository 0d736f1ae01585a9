"""Combinations of features in which every two of them meet, as few as that takes.

`FEATURES` has what a user may combine and `is_allowed` what cannot be (and is refused). The
covering array holds every pair of values that any allowed combination has: a mistake in how two
features work together shows in some row of it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

import numpy as np

from megatron_longpo.config.names import ObjectiveName
from megatron_longpo.config.objective_defaults import OBJECTIVE_DEFAULTS
from megatron_longpo.config.train import ObjectiveConfig, ParallelConfig
from tests.parity.cases import LORA, RowShape
from tests.parity.steps import Steps

CONTEXT_SIZES = {"none": 1, "a2a": 2, "all_gather": 2, "a2a+all_gather": 4}
MOST_RANKS = 8

FEATURES: dict[str, tuple[str, ...]] = {
    "sharing": ("shared", "two rows"),
    "reference": ("online", "cached", "offload", "none"),
    "objective": tuple(OBJECTIVE_DEFAULTS),
    "tensor": ("1", "2"),
    "sequence": ("off", "on"),
    "pipeline": ("1", "2"),
    "virtual": ("none", "2"),
    "context": tuple(CONTEXT_SIZES),
    "data": ("1", "2"),
    "optimizer": ("plain", "distributed"),
    "recompute": ("none", "selective", "full"),
    "adapters": ("none", "lora"),
    "precision": ("fp32", "bf16"),
    "turns": ("one", "several"),
}


OBJECTIVES = {
    **{name: ObjectiveConfig(name=name) for name in get_args(ObjectiveName)},
    # Both terms large enough to see.
    "longpo": ObjectiveConfig(beta=0.1, preference_weight=0.5),
    # In bf16 a log-prob of an answer is off by tenths of a nat, of which its loss sees six beta.
    "solopo_dpo": ObjectiveConfig(name="solopo_dpo", beta=0.05),
}

NUM_PAIRS = 6
SHAPES = {
    "one": tuple(
        RowShape(
            prompt_length=17 + 5 * index,
            chosen_answer_lengths=(1 + index,),
            rejected_answer_lengths=(5 - index % 4,),
        )
        for index in range(NUM_PAIRS)
    ),
    "several": tuple(
        RowShape(
            prompt_length=11 + 3 * index,
            chosen_answer_lengths=(2 + index % 3, 1, 4)[: 2 + index % 2],
            rejected_answer_lengths=(3, 5 - index % 2, 2)[: 2 + index % 2],
            chunk_lengths=(6, 4, 9)[: 2 + index % 2],
        )
        for index in range(NUM_PAIRS)
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Combination:
    """One value of each feature."""

    sharing: str
    reference: str
    objective: Any
    tensor: str
    sequence: str
    pipeline: str
    virtual: str
    context: Any
    data: str
    optimizer: str
    recompute: Any
    adapters: str
    precision: Any
    turns: str

    @property
    def context_size(self) -> int:
        return CONTEXT_SIZES[self.context]

    @property
    def num_ranks(self) -> int:
        return int(self.tensor) * int(self.pipeline) * self.context_size * int(self.data)

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor=int(self.tensor),
            pipeline=int(self.pipeline),
            virtual_pipeline=None if self.virtual == "none" else int(self.virtual),
            context=self.context_size,
            context_comm="all_gather" if self.context == "none" else self.context,
            context_inner=2 if self.context == "a2a+all_gather" else None,
            sequence=self.sequence == "on",
        )

    @property
    def steps(self) -> Steps:
        return Steps(
            objective=OBJECTIVES[self.objective],
            distributed=self.optimizer == "distributed",
            lora=LORA if self.adapters == "lora" else None,
            # A virtual pipeline of two chunks on two stages.
            layers=4,
            shapes=SHAPES[self.turns],
            share_prefix=self.sharing == "shared",
            recompute=self.recompute,
            dtype=self.precision,
            reference_mode="online" if self.reference == "offload" else self.reference,
            offload=self.reference == "offload",
        )

    @property
    def layout(self) -> str:
        """`TP2+SP PP2 VPP2 CP2 a2a DP2`, or `one process`."""
        parts = []
        if self.tensor != "1":
            parts.append("TP2+SP" if self.sequence == "on" else "TP2")
        if self.pipeline != "1":
            parts.append("PP2" if self.virtual == "none" else "PP2 VPP2")
        if self.context != "none":
            parts.append(f"CP{self.context_size} {self.context}")
        if self.data != "1":
            parts.append("DP2")
        return " ".join(parts) or "one process"

    def __str__(self) -> str:
        rest = (self.objective, self.reference, self.sharing, self.precision, self.turns)
        more = (self.optimizer, self.recompute, self.adapters)
        return ", ".join([self.layout, *rest, *more])


FREE = ("sharing", "optimizer", "recompute", "precision", "turns")
"""Features that neither `is_allowed` nor the number of ranks depends on."""


def is_allowed(one: Combination) -> bool:
    """Whether the settings make sense together; what does not is refused by `longpo train`."""
    defaults = OBJECTIVE_DEFAULTS[one.objective]
    is_referenced = defaults.mode == "online"
    return not (
        (one.sequence == "on" and one.tensor == "1")
        or (one.virtual != "none" and one.pipeline == "1")
        or one.num_ranks > MOST_RANKS
        or (not is_referenced and one.reference != "none")
        # Whole distributions come from a reference in the same pass alone.
        or (defaults.has_divergence and one.reference in ("none", "cached"))
        # One set of weights serves policy and reference.
        or (one.adapters == "lora" and one.reference == "offload")
    )


Pair = tuple[tuple[str, str], tuple[str, str]]


def pairs_of(one: Combination) -> Iterator[Pair]:
    values = [(field.name, getattr(one, field.name)) for field in fields(one)]
    yield from itertools.combinations(values, 2)


@functools.cache
def allowed_pairs() -> frozenset[Pair]:
    """Every pair of values that some allowed combination has."""
    rows, _ = _allowed_rows()
    values = [[(name, value) for value in FEATURES[name]] for name in FEATURES]
    found = set()
    for left, right in itertools.combinations(range(len(values)), 2):
        met = np.zeros((len(values[left]), len(values[right])), dtype=bool)
        met[rows[:, left], rows[:, right]] = True
        found |= {(values[left][a], values[right][b]) for a, b in np.argwhere(met)}
    return frozenset(found)


@functools.cache
def covering_array() -> tuple[Combination, ...]:
    """Combinations that together have all of `allowed_pairs`, the same every time.

    Greedy: the row that adds most pairs comes next, of those the one with the fewest ranks.
    """
    rows, ranks = _allowed_rows()
    order = np.lexsort((np.random.default_rng(0).permutation(len(rows)), ranks))
    rows = rows[order]
    sizes = [len(values) for values in FEATURES.values()]
    pairs = list(itertools.combinations(range(len(sizes)), 2))
    # Of every two features, the number of a row's pair of values.
    keys = [(rows[:, a] * sizes[b] + rows[:, b]).astype(np.int16) for a, b in pairs]
    covered: list[set[int]] = [set() for _ in pairs]
    gains = np.full(len(rows), len(pairs), dtype=np.int16)
    chosen = []
    while gains.any():
        best = int(np.argmax(gains))
        chosen.append(_combination(rows[best]))
        for key, done in zip(keys, covered, strict=True):
            if int(key[best]) not in done:
                done.add(int(key[best]))
                gains -= key == key[best]
    return tuple(chosen)


@functools.cache
def _allowed_rows() -> tuple[np.ndarray, np.ndarray]:
    """[rows, features] int64 indices into the values of `FEATURES`, and [rows] numbers of ranks.

    Of the free features the first values are looked at: the others would say the same, 48 times.
    """
    sizes = [len(values) for values in FEATURES.values()]
    bound = [1 if name in FREE else len(values) for name, values in FEATURES.items()]
    looked_at = [_combination(row) for row in np.ndindex(*bound)]
    allowed, ranks = (
        np.broadcast_to(np.array(found).reshape(bound), sizes).ravel()
        for found in (
            [is_allowed(one) for one in looked_at],
            [one.num_ranks for one in looked_at],
        )
    )
    rows = np.indices(sizes).reshape(len(sizes), -1).T
    return rows[allowed], ranks[allowed]


def _combination(row: Sequence[int] | np.ndarray) -> Combination:
    named = {
        name: values[index] for (name, values), index in zip(FEATURES.items(), row, strict=True)
    }
    return Combination(**named)


def combinations_of(num_ranks: int, *, part: int = 0, parts: int = 1) -> list[Combination]:
    """The array's rows of that many ranks; with `parts`, an even slice of them."""
    found = [one for one in covering_array() if one.num_ranks == num_ranks]
    return found[part::parts]
