"""What is run, in the order of its worth: a study that is cut short has the most telling runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SEEDS = (42, 43, 44)
ITERATIONS = (1, 2)
Setting = tuple[float, float, float]
"""Of LongPO: beta, weight of the preference, weight of the answers' NLL."""
SETTING: Setting = (0.1, 0.1, 1.0)
"""In the comparison; the grid has others."""
GRID: tuple[Setting, ...] = (
    (0.1, 1.0, 1.0),
    (0.1, 1.0, 0.0),
    (0.1, 0.01, 0.0),
    (0.01, 0.01, 0.0),
)
"""(0.1, 0.01, 0) is the paper's, (0.01, 0.01, 0) its code's."""
LOW_RATE = ("lr 3e-5", {"optimizer.lr": 3e-5})
"""What it is called, and the options: a third of train.yaml's learning rate."""
LOW_RATE_GRID: tuple[Setting, ...] = ((0.1, 0.1, 0.03), (0.1, 0.1, 0.1), (0.1, 0.1, 0.3))
"""Settings that are tried with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Sizes of the study: the real one, or a tiny one that a CPU does in minutes."""

    num_pairs: int
    """Rows that all runs train on."""
    document_tokens: tuple[int, int]
    """Least and most tokens of a document."""
    steps: int
    is_tiny: bool = False
    generate: Mapping[str, Any] = field(default_factory=dict)
    """Options over generate.yaml; likewise the others."""
    generate_next: Mapping[str, Any] = field(default_factory=dict)
    """Further ones where the model of the first iteration writes."""
    tokenize: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    ruler: Mapping[str, Any] = field(default_factory=dict)


FULL = Scale(
    num_pairs=160,
    document_tokens=(32768, 33600),
    steps=160,
    # The extended model reads longer chunks well, and the whole document for rejected answers.
    generate_next={"chunk_min_tokens": 1600, "chunk_max_tokens": 3200},
    tokenize={"max_length": 34816, "short_max_length": 8192},
)

_TINY_CHUNKS = {"chunk_min_tokens": 150, "chunk_max_tokens": 400}

TINY = Scale(
    num_pairs=4,
    document_tokens=(1200, 1500),
    steps=4,
    is_tiny=True,
    generate={
        **_TINY_CHUNKS,
        "turns": 2,
        "max_new_tokens": 12,
        "max_prompt_tokens": 1000,
        "dtype": "fp32",
        # A model of random weights answers nothing right.
        "require_fact": False,
        "filters": [],
    },
    generate_next={"max_prompt_tokens": 1900},
    tokenize={"max_length": 2048, "short_max_length": 1024},
    train={
        "model.dtype": "fp32",
        "model.max_position_embeddings": 2048,
        "data.max_length": 2048,
        "train.eval_interval": 2,
        "evaluation.retrieval.lengths": [512, 1024],
        "evaluation.retrieval.samples": 1,
        "evaluation.nll.length": 1024,
        "evaluation.nll.bucket": 512,
    },
    evaluate={
        "dtype": "fp32",
        "evaluation.retrieval.lengths": [512, 1024],
        "evaluation.retrieval.samples": 1,
        "evaluation.nll.length": 1024,
        "evaluation.nll.samples": 2,
        "evaluation.nll.bucket": 512,
    },
    ruler={
        "dtype": "fp32",
        "harness.lengths": [2048],
        "harness.samples": 1,
        "harness.tasks": ["ruler_niah_single_1", "ruler_fwe"],
    },
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One way to train on the rows."""

    name: str
    title: str
    options: Mapping[str, Any]
    """Of `longpo train`."""
    step_seconds: float
    """Predicted for one H100 and a row of 34K tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One model: trained and evaluated, or, without a method, the base under another theta."""

    name: str
    title: str
    method: Method | None = None
    theta: float | None = None
    seed: int = 0
    iteration: int = 1
    """2 = starts from the model and the rows that the first iteration has made."""
    is_parent: bool = False
    """Whether its model is the one that the second iteration starts from."""
    is_exported: bool = False
    """Whether its model is kept in Hugging Face's format, for RULER or another iteration."""
    is_evaluated: bool = True
    """Without: shows what the evaluations in training cost; neither they nor others are made."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Beside the method's."""
    is_compared: bool = True
    """Whether it is in the main table, not in that of other settings."""

    @property
    def group(self) -> str:
        """The line of the table that it belongs to: its name without the seed."""
        return self.name.removesuffix(f"-s{self.seed}")


def longpo(setting: Setting) -> Method:
    beta, weight, answers = setting
    options = {
        "objective.name": "longpo",
        "objective.beta": beta,
        "objective.preference_weight": weight,
    }
    return Method(
        name=f"longpo-b{beta:g}-w{weight:g}" + (f"-a{answers:g}" if answers else ""),
        title=f"LongPO, beta {beta:g}, weight {weight:g}"
        + (f", answers {answers:g}" if answers else ""),
        options=options | ({"objective.answer_nll_weight": answers} if answers else {}),
        step_seconds=0.7,
    )


def methods(setting: Setting) -> list[Method]:
    """LongPO and what it is compared with, LongPO first, then as published: no NLL of answers."""
    first = longpo(setting)
    beta, weight, _ = setting
    preference = longpo((beta, weight, 0.0))
    # The same rows, learning rate and steps for all; only the loss differs.
    return [
        first,
        *([preference] if preference.name != first.name else []),
        Method(
            name="nll",
            title="NLL of the chosen row",
            options={"objective.name": "sft", "objective.nll_scope": "chosen_row"},
            step_seconds=0.6,
        ),
        Method(
            name="sft",
            title="SFT on chosen answers",
            options={"objective.name": "sft", "objective.nll_scope": "chosen_answers"},
            step_seconds=0.6,
        ),
        Method(
            name="dpo",
            title="DPO, beta 0.1",
            options={"objective.name": "dpo", "objective.beta": 0.1},
            step_seconds=0.8,
        ),
        Method(
            name=f"{preference.name}-no-nll",
            title="LongPO without NLL",
            options={**preference.options, "objective.nll_weight": 0},
            step_seconds=0.7,
        ),
        Method(
            name=f"{first.name}-long-reference",
            title="LongPO without the short-to-long constraint",
            options={**first.options, "reference.context": "long"},
            step_seconds=0.8,
        ),
    ]


def plan(setting: Setting, *, is_tiny: bool = False) -> list[Run]:
    """All runs, the most telling first; a tiny study has one seed and no other settings."""
    compared = methods(setting)
    main = compared[0]
    first, *further = SEEDS[:1] if is_tiny else SEEDS
    low_rate, options = LOW_RATE
    return [
        Run(name="base-theta1e5", title="base", theta=1e5),
        _trained(main, first, is_exported=True),
        *(_trained(method, first) for method in compared[1:]),
        Run(name="base-theta1e6", title="base, theta 1e6", theta=1e6),
        Run(name="base-theta4e5", title="base, theta 4e5", theta=4e5),
        *(_trained(method, seed) for seed in further for method in compared),
        _varied(main, low_rate, options, first, is_parent=True),
        _varied(main, f"{low_rate}, second iteration", options, first, iteration=2),
        Run(
            name=f"{main.name}-unobserved-s{first}",
            title="LongPO, not evaluated in training",
            method=main,
            seed=first,
            is_evaluated=False,
            is_compared=False,
        ),
        *([] if is_tiny else _other_settings(compared, first)),
    ]


def _other_settings(compared: Sequence[Method], seed: int) -> Iterator[Run]:
    """What explains the comparison: plain NLL with more steps, all methods with a lower rate, the
    most telling with all seeds, and theta 4e5, which costs less on short input than 1e6."""
    main, *others = compared
    plain_nll, sft = (
        next(method for method in compared if method.name == name) for name in ("nll", "sft")
    )
    yield _varied(plain_nll, "480 steps", {"train.steps": 480}, seed)
    grid = [method for method in map(longpo, LOW_RATE_GRID) if method not in compared]
    for method in [*others, *grid]:
        yield _varied(method, *LOW_RATE, seed)
    for further in SEEDS[1:]:
        for method in (main, plain_nll, sft):
            yield _varied(method, *LOW_RATE, further)
    for method in map(longpo, GRID):
        if method not in compared:
            yield _trained(method, seed, is_compared=False)
    for method in (main, plain_nll):
        yield _varied(method, "theta 4e5", {"model.rope_theta": 4e5}, seed)


def _trained(
    method: Method, seed: int, *, is_exported: bool = False, is_compared: bool = True
) -> Run:
    return Run(
        name=f"{method.name}-s{seed}",
        title=method.title,
        method=method,
        seed=seed,
        is_exported=is_exported,
        is_compared=is_compared,
    )


def _varied(
    method: Method,
    what: str,
    options: Mapping[str, Any],
    seed: int,
    *,
    iteration: int = 1,
    is_parent: bool = False,
) -> Run:
    """A run outside the comparison; `what` differs, such as "lr 3e-5"."""
    short = what.replace(" steps", "").replace(" iteration", "").replace(", ", "-")
    return Run(
        name=f"{method.name}-{short.replace(' ', '')}-s{seed}",
        title=f"{method.title}, {what}",
        method=method,
        seed=seed,
        iteration=iteration,
        is_parent=is_parent,
        is_exported=is_parent,
        options=options,
        is_compared=False,
    )
