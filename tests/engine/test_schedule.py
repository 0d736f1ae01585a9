"""What a microbatch hands to Megatron, and what it logs."""

from __future__ import annotations

import pytest
import torch

from megatron_longpo.data.trees.forest import Term
from megatron_longpo.engine.console import RunConsole
from megatron_longpo.engine.metrics import mean_metrics
from megatron_longpo.engine.schedule import _loss
from megatron_longpo.objectives import LossOutput, Needs, Objective, PairLogps
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.parallel.layout import RankPack
from tests.engine.test_pair_sums import SHORT, SHORT_C, SHORT_R, C, R, tokens_with_edges
from tests.objectives import logps

LONGPO = logps.objective(preference_weight=2.0)


def pack(weights: list[int]) -> RankPack:
    """A pair an edge: chosen and rejected, scored by policy and reference."""
    edges = [(pair, 0, term) for pair in range(len(weights)) for term in (C, R)]
    short_edges = [(pair, 0, term) for pair in range(len(weights)) for term in (SHORT_C, SHORT_R)]
    return RankPack(
        policy=tokens_with_edges(edges),
        reference=tokens_with_edges(short_edges),
        turn_mask=torch.ones(len(weights), 1, dtype=torch.bool),
        reference_terms=SHORT,
        counts=dict.fromkeys((Term(C), Term(R)), torch.ones(len(weights), 1, dtype=torch.int64)),
        weights=torch.tensor(weights),
    )


def test_sums_and_the_number_of_pairs(single_process: Groups) -> None:
    # Two pairs, margins +3 and -1 nats over the reference.
    policy, reference = [-1.0, -4.0, -5.0, -4.0], [-2.0, -2.0, -1.0, -1.0]
    loss, count, sums = _loss(
        torch.tensor(policy + reference, requires_grad=True),
        pack=pack([1, 1]),
        objective=LONGPO,
        groups=single_process,
    )
    preference = sum(
        float(torch.nn.functional.softplus(torch.tensor(-0.5 * z, dtype=torch.float64)))
        for z in (3.0, -1.0)
    )
    assert count.dtype == torch.int32 and count.shape == () and count == 2
    assert loss.requires_grad and loss.item() == pytest.approx(2 * preference)
    expected = {
        "pairs": 2,
        "loss": 2 * preference,
        "preference_loss": preference,
        "logps/chosen": -6,
        "logps/rejected": -8,
        "reference_logps/chosen": -3,
        "reference_logps/rejected": -3,
        "rewards/chosen": 0.5 * (-6 + 3),
        "rewards/rejected": 0.5 * (-8 + 3),
        "rewards/margins": 0.5 * 2,
        "rewards/accuracies": 1,
    }
    assert {name: value.item() for name, value in sums.items()} == pytest.approx(expected)


def test_a_filler_counts_for_nothing_even_where_it_overflows(single_process: Groups) -> None:
    scores = torch.tensor(
        [-1.0, -4.0, -torch.inf, -4.0, -2.0, -2.0, -1.0, -1.0], requires_grad=True
    )
    loss, count, sums = _loss(
        scores,
        pack=pack([1, 0]),
        objective=LONGPO,
        groups=single_process,
    )
    alone, _, expected = _loss(
        scores[[0, 1, 4, 5]],
        pack=pack([1]),
        objective=LONGPO,
        groups=single_process,
    )
    assert count == 1 and loss.item() == alone.item()
    assert {k: v.item() for k, v in sums.items()} == {k: v.item() for k, v in expected.items()}


def test_a_microbatch_of_fillers_still_has_a_backward(single_process: Groups) -> None:
    scores = torch.full((8,), -1.0, requires_grad=True)
    loss, count, _ = _loss(
        scores,
        pack=pack([0, 0]),
        objective=LONGPO,
        groups=single_process,
    )
    (gradient,) = torch.autograd.grad(loss, scores)
    assert count == 0 and loss == 0 and gradient.eq(0).all()


def test_what_an_objective_has_not_is_not_logged(single_process: Groups) -> None:
    sft = logps.objective("sft", nll_weight=1.0)
    _, _, sums = _loss(torch.zeros(8), pack=pack([1, 1]), objective=sft, groups=single_process)
    assert set(sums) == {"pairs", "loss", "nll_loss"}


class Surprised(Objective):
    """An objective from outside, with a number of its own."""

    @property
    def needs(self) -> Needs:
        return Needs()

    def __call__(self, logps: PairLogps) -> LossOutput:
        chosen_N = logps.policy["long_chosen"].sum(dim=1)
        return LossOutput(loss_N=-chosen_N, metrics={"surprise_loss": chosen_N.detach() ** 2})


def test_a_new_number_of_an_objective_is_logged_and_shown(
    single_process: Groups, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = torch.tensor([-1.0, -4.0, -5.0, -4.0, 0.0, 0.0, 0.0, 0.0])
    _, _, sums = _loss(scores, pack=pack([1, 1]), objective=Surprised(), groups=single_process)
    means = mean_metrics({name: value.item() for name, value in sums.items()})
    assert means["surprise_loss"] == 13 and means["preference_loss"] is None
    RunConsole(is_main=True).say_step({"step": 1, **means}, num_steps=2)
    assert capsys.readouterr().out == "step 1/2  loss 3  surprise 13\n"
