"""What each name needs of pack and head."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_longpo.objectives import OBJECTIVES, Needs
from tests.objectives.logps import DEFAULTS, objective

LONG: Any = ("long_chosen", "long_rejected")
SHORT: Any = ("short_chosen", "short_rejected")
SOLOPO: Any = (*SHORT, "long_chosen")


@pytest.mark.parametrize("name", ["longpo", "dpo", "ipo"])
def test_referenced_preferences_need_both_branches_and_a_reference(name: str) -> None:
    for context, rows in (("short", SHORT), ("long", LONG)):
        for scope in ("chosen_row", "chosen_answers"):
            settings: dict[str, Any] = {"nll_scope": scope, "reference_context": context}
            with_nll = objective(name, nll_weight=1.0, **settings)
            assert with_nll.needs == Needs(policy=LONG, reference=rows, nll=settings["nll_scope"])
            # The preference is still reported where it does not train.
            assert objective(name, preference_weight=0.0, **settings).needs.policy == LONG
    assert objective(name, nll_weight=0.0).needs.nll is None


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_these_need_no_reference(name: str) -> None:
    assert objective(name).needs == Needs(policy=LONG)
    assert objective(name, nll_weight=1.0).needs == Needs(policy=LONG, nll="chosen_answers")


def test_sft_needs_one_branch_and_no_reference() -> None:
    assert objective("sft").needs == Needs(nll="chosen_answers")
    assert objective("sft", nll_scope="chosen_row").needs == Needs(nll="chosen_row")
    assert objective("sft_rejected").needs == Needs(nll="rejected_answers")


def test_solopo_reads_the_short_rows_with_the_policy() -> None:
    assert objective("solopo_dpo").needs == Needs(policy=SOLOPO, reference=SOLOPO)
    assert objective("solopo_simpo").needs == Needs(policy=SOLOPO)
    with_nll = Needs(policy=SOLOPO, nll="short_chosen_answers")
    assert objective("solopo_orpo", nll_weight=1.0).needs == with_nll


def test_divergences_pair_a_long_row_with_the_references() -> None:
    rejected: Any = ("long_rejected", "short_rejected")
    assert objective("opsdl").needs == Needs(divergence=rejected)
    chosen: Any = ("long_chosen", "short_chosen")
    assert objective("opsdl", divergence_scope="chosen_answers").needs == Needs(divergence=chosen)
    constrained = objective("sft_short_to_long", nll_weight=1.0)
    assert constrained.needs == Needs(nll="chosen_answers", divergence=chosen)
    long = objective("sft_short_to_long", reference_context="long").needs
    assert long == Needs(divergence=("long_chosen", "long_chosen"))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_field_has_a_setting(name: str) -> None:
    """A field that no setting reaches would have a default that nobody can change."""
    built = objective(name)
    fixed = OBJECTIVES[name][1]
    for field in dataclasses.fields(built):
        assert field.name in {*DEFAULTS, "reference_context", *fixed}, field.name
    if built.compared is not None:
        assert {*built.compared} <= {*built.needs.policy}
