"""What an objective's name decides of the settings, and which settings it has no use for.

A message says field, value, rule and remedy in one line.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from megatron_longpo.config.names import AnswerScope, NllScope, ObjectiveName, ReferenceContext
from megatron_longpo.config.train_sections import ObjectiveConfig, TrainConfig
from megatron_longpo.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveDefaults:
    """Values of `objective.*` and `reference.*` that a name stands for; 0 = has no such term."""

    beta: float = 0.0
    preference_weight: float = 0.0
    nll_weight: float = 0.0
    nll_scope: NllScope = "chosen_answers"
    gamma: float = 0.0
    alignment_weight: float = 0.0
    divergence_weight: float = 0.0
    divergence_scope: AnswerScope = "chosen_answers"
    context: ReferenceContext = "long"
    mode: Literal["online", "none"] = "none"
    unused: tuple[str, ...] = ()
    """Keys of `objective.*` that this objective has no use for and that only its default fits."""

    @property
    def has_preference(self) -> bool:
        return self.preference_weight > 0

    @property
    def has_divergence(self) -> bool:
        return self.divergence_weight > 0


WITHOUT_PREFERENCE = ("label_smoothing", "turns", "answer_nll_weight")
"""Keys that mean nothing where no answers are compared."""

OBJECTIVE_DEFAULTS: dict[ObjectiveName, ObjectiveDefaults] = {
    "longpo": ObjectiveDefaults(
        beta=0.01,
        preference_weight=0.01,
        nll_weight=1.0,
        nll_scope="chosen_row",
        context="short",
        mode="online",
    ),
    "dpo": ObjectiveDefaults(beta=0.1, preference_weight=1.0, mode="online"),
    "ipo": ObjectiveDefaults(
        beta=0.1, preference_weight=1.0, mode="online", unused=("label_smoothing",)
    ),
    # beta and gamma / beta within the ranges that SimPO's paper found good.
    "simpo": ObjectiveDefaults(beta=2.0, gamma=1.0, preference_weight=1.0),
    "orpo": ObjectiveDefaults(preference_weight=0.1, nll_weight=1.0, unused=("label_smoothing",)),
    "sft": ObjectiveDefaults(nll_weight=1.0, unused=WITHOUT_PREFERENCE),
    "sft_rejected": ObjectiveDefaults(nll_weight=1.0, unused=(*WITHOUT_PREFERENCE, "nll_scope")),
    "sft_short_to_long": ObjectiveDefaults(
        nll_weight=1.0,
        divergence_weight=0.1,
        context="short",
        mode="online",
        unused=(*WITHOUT_PREFERENCE, "divergence_scope"),
    ),
    "solopo_dpo": ObjectiveDefaults(
        beta=0.1,
        preference_weight=1.0,
        alignment_weight=3.0,
        context="short",
        mode="online",
        unused=("nll_scope",),
    ),
    "solopo_simpo": ObjectiveDefaults(
        beta=2.0, gamma=1.0, preference_weight=1.0, alignment_weight=1.0, unused=("nll_scope",)
    ),
    "solopo_orpo": ObjectiveDefaults(
        preference_weight=0.1,
        nll_weight=1.0,
        alignment_weight=1.0,
        unused=("label_smoothing", "nll_scope"),
    ),
    "opsdl": ObjectiveDefaults(
        divergence_weight=1.0,
        divergence_scope="rejected_answers",
        context="short",
        mode="online",
        unused=(*WITHOUT_PREFERENCE, "nll_scope", "nll_weight"),
    ),
}

SWITCHED_OFF = ("beta", "gamma", "preference_weight", "alignment_weight", "divergence_weight")
"""Keys whose default of 0 means that the objective has no such term."""


def filled_objective(objective: ObjectiveConfig, defaults: ObjectiveDefaults) -> ObjectiveConfig:
    """`objective` without a null: what the user left out has the default of its name.

    An objective without a temperature has beta 0, whatever a YAML that several share says.
    """
    filled: dict[str, Any] = {
        field.name: getattr(defaults, field.name)
        for field in fields(objective)
        if getattr(objective, field.name) is None
    }
    if not defaults.beta:
        filled["beta"] = 0.0
    return replace(objective, **filled)


def check_objective(config: TrainConfig, defaults: ObjectiveDefaults) -> None:
    """Refuses settings that the named objective cannot mean; `config` is filled."""
    objective = config.objective
    for key in SWITCHED_OFF:
        if getattr(objective, key) and not getattr(defaults, key):
            able = [name for name, of in OBJECTIVE_DEFAULTS.items() if getattr(of, key)]
            raise UserError(
                f"objective.{key} ({getattr(objective, key):g}): {objective.name} has no use for "
                f"it. Remove it, or use objective.name {', '.join(able)}"
            )
    for key in defaults.unused:
        value, only = getattr(objective, key), _only_value(key, defaults)
        if value != only:
            raise UserError(
                f"objective.{key} ({value}): {objective.name} has no use for it. Remove it"
            )
    if defaults.beta and not objective.beta:
        raise UserError(
            f"objective.beta (0) must be above 0 for {objective.name}. Its default is "
            f"{defaults.beta:g}"
        )
    _check_something_trains(objective, defaults)
    _check_reference(config, defaults)


def _only_value(key: str, defaults: ObjectiveDefaults) -> Any:
    return {"label_smoothing": 0.0, "turns": "summed", "answer_nll_weight": 0.0}.get(
        key, getattr(defaults, key, None)
    )


def _check_something_trains(objective: ObjectiveConfig, defaults: ObjectiveDefaults) -> None:
    weights = [
        key
        for key in ("preference_weight", "nll_weight", "alignment_weight", "divergence_weight")
        if getattr(defaults, key) or (key == "nll_weight" and defaults.has_preference)
    ]
    weights += ["answer_nll_weight"] * defaults.has_preference
    if not any(getattr(objective, key) for key in weights):
        named = " and ".join(f"objective.{key} (0)" for key in weights)
        raise UserError(f"{named}: nothing is left to train. Set one of them above 0")


def _check_reference(config: TrainConfig, defaults: ObjectiveDefaults) -> None:
    name, mode = config.objective.name, config.reference.mode
    if defaults.mode == "none" and mode != "none":
        raise UserError(f"reference.mode ({mode}): {name} uses no reference. Remove it")
    if defaults.has_divergence and mode != "online":
        raise UserError(
            f"reference.mode ({mode}): {name} compares whole next-token distributions, which only "
            "a reference in the same pass gives. Use online"
        )
