"""What each name needs, and which settings are refused."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_longpo.objectives import OBJECTIVES, Needs, build_objective


def build(name: str, **settings: Any) -> Any:
    defaults: dict[str, Any] = {
        "beta": 0.1,
        "preference_weight": 0.0 if name.startswith("sft") else 1.0,
        "nll_weight": 1.0,
        "nll_scope": "chosen_answers",
        "turns": "summed",
        "label_smoothing": 0.0,
    }
    return build_objective(name, **(defaults | settings))


@pytest.mark.parametrize("name", ["longpo", "dpo"])
def test_preference_objectives_need_both_branches_and_a_reference(name: str) -> None:
    both: Any = ("chosen", "rejected")
    for scope in ("chosen_row", "chosen_answers"):
        needs = build(name, nll_scope=scope).needs
        assert needs == Needs(branches=both, preference=True, reference=True, nll=scope)
    without_nll = build(name, nll_weight=0.0).needs
    assert without_nll == Needs(branches=both, preference=True, reference=True, nll=None)
    # The preference is still reported where it does not train.
    assert build(name, preference_weight=0.0).needs.preference


def test_sft_needs_one_branch_and_no_reference() -> None:
    def needs(branch: Any, nll: Any) -> Needs:
        return Needs(branches=(branch,), preference=False, reference=False, nll=nll)

    assert build("sft").needs == needs("chosen", "chosen_answers")
    assert build("sft", nll_scope="chosen_row").needs == needs("chosen", "chosen_row")
    assert build("sft_rejected").needs == needs("rejected", "rejected_answers")


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("lonpo", {}, "objective.name (lonpo): use one of longpo, dpo, sft, sft_rejected"),
        ("longpo", {"beta": None}, "objective.beta (None)"),
        ("dpo", {"beta": 0.0}, "objective.beta (0.0)"),
        ("longpo", {"preference_weight": 0.0, "nll_weight": 0.0}, "both 0"),
        ("longpo", {"nll_weight": -1.0}, "objective.nll_weight (-1.0)"),
        ("dpo", {"label_smoothing": 0.5}, "objective.label_smoothing (0.5)"),
        ("dpo", {"turns": "mean"}, "objective.turns (mean)"),
        ("dpo", {"nll_scope": "all"}, "objective.nll_scope (all)"),
        ("sft", {"preference_weight": 0.1}, "objective.preference_weight (0.1)"),
        ("sft", {"nll_weight": 0.0}, "objective.nll_weight (0.0)"),
        ("sft_rejected", {"nll_scope": "chosen_row"}, "objective.nll_scope (chosen_row)"),
    ],
)
def test_settings_that_contradict_the_objective(
    name: str, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError) as raised:
        build(name, **settings)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_name_builds() -> None:
    for name in OBJECTIVES:
        assert build(name).needs.branches


def test_sft_takes_no_beta() -> None:
    assert build("sft", beta=None).needs.nll == "chosen_answers"
