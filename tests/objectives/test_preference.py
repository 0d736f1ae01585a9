"""LongPO and DPO against numbers worked by hand and against closed-form gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_longpo.objectives import PairLogps
from megatron_longpo.objectives.preference import logistic_loss
from tests.objectives.logps import objective, pair_logps

BETA = 0.5
W, L = "long_chosen", "long_rejected"


def two_pairs(name: str = "longpo") -> PairLogps:
    """Pair 0 has two turns, pair 1 has one; what stands in its absent turn must not matter.

    z of pair 0, turn 0: (-3 - -5) - (-2 - -1) = 2 - -1 =  3
    z of pair 0, turn 1: (-4 - -3) - (-1 - -1) = -1 - 0 = -1      summed: 2
    z of pair 1, turn 0: (-6 - -2) - (-5 - -5) = -4 - 0 = -4
    """
    garbage = float("nan")
    context = "long" if name == "dpo" else "short"
    return pair_logps(
        [[True, True], [True, False]],
        policy={
            W: torch.tensor([[-3.0, -4.0], [-6.0, garbage]], requires_grad=True),
            L: torch.tensor([[-5.0, -3.0], [-2.0, 1e9]], requires_grad=True),
        },
        reference={
            f"{context}_chosen": torch.tensor([[-2.0, -1.0], [-5.0, -1e9]]),
            f"{context}_rejected": torch.tensor([[-1.0, -1.0], [-5.0, garbage]]),
        },
        nll=(torch.tensor([12.0, 10.0], requires_grad=True), [4, 5]),
    )


def pairs_with_z(z_N: Tensor) -> PairLogps:
    """One-turn pairs whose z is the chosen log-prob itself."""
    zeros = torch.zeros_like(z_N)[:, None]
    return pair_logps(
        torch.ones_like(zeros, dtype=torch.bool),
        policy={W: z_N[:, None], L: zeros},
        reference={"short_chosen": zeros, "short_rejected": zeros},
    )


def softplus(x: float) -> float:
    """log(1 + exp(x)), which is -log sigmoid(-x)."""
    return math.log1p(math.exp(x))


def close(actual: Tensor | None, expected: list[float], rtol: float = 1e-6) -> None:
    assert actual is not None
    torch.testing.assert_close(
        actual.detach(), torch.tensor(expected, dtype=actual.dtype), rtol=rtol, atol=1e-7
    )


@pytest.mark.parametrize("name", ["longpo", "dpo"])
def test_turns_are_summed_inside_one_logistic(name: str) -> None:
    out = objective(name)(two_pairs(name))
    # -log sigmoid(0.5 * 2) = log(1 + e^-1) = 0.313262;  -log sigmoid(-2) = log(1 + e^2) = 2.126928
    close(out.loss_N, [0.3132617, 2.1269280])
    close(out.metrics["preference_loss"], [0.3132617, 2.1269280])
    # beta * (P_w - R_w): 0.5 * ((-3 + 2) + (-4 + 1)) = -2;  0.5 * (-6 + 5) = -0.5
    # beta * (P_l - R_l): 0.5 * ((-5 + 1) + (-3 + 1)) = -3;  0.5 * (-2 + 5) =  1.5
    close(out.metrics["rewards/chosen"], [-2.0, -0.5])
    close(out.metrics["rewards/rejected"], [-3.0, 1.5])
    assert "nll_loss" not in out.metrics


def test_per_turn_is_a_mean_of_logistics_over_the_pairs_own_turns() -> None:
    out = objective(turns="per_turn")(two_pairs())
    # Pair 0: (log(1 + e^-1.5) + log(1 + e^0.5)) / 2 = (0.201413 + 0.974077) / 2 = 0.587745
    # Pair 1 has one turn: divided by 1, not by T = 2.
    close(out.loss_N, [0.5877451, 2.1269280])
    # Rewards are sums over turns whatever the loss does with turns.
    close(out.metrics["rewards/chosen"], [-2.0, -0.5])
    close(out.metrics["rewards/rejected"], [-3.0, 1.5])


def test_label_smoothing_mixes_in_the_swapped_pair() -> None:
    out = objective(label_smoothing=0.1)(two_pairs())
    # Pair 0: 0.9 * log(1 + e^-1) + 0.1 * log(1 + e^1) = 0.9 * 0.3132617 + 0.1 * 1.3132617
    # Pair 1: 0.9 * log(1 + e^2) + 0.1 * log(1 + e^-2) = 0.9 * 2.1269280 + 0.1 * 0.1269280
    close(out.loss_N, [0.4132617, 1.9269280])


def test_label_smoothing_per_turn() -> None:
    out = objective(label_smoothing=0.2, turns="per_turn")(two_pairs())
    first = 0.8 * softplus(-1.5) + 0.2 * softplus(1.5)
    second = 0.8 * softplus(0.5) + 0.2 * softplus(-0.5)
    close(out.loss_N, [(first + second) / 2, 0.8 * softplus(2.0) + 0.2 * softplus(-2.0)])


def test_weights_multiply_their_own_term_and_leave_the_report_alone() -> None:
    out = objective(preference_weight=0.01, nll_weight=2.0)(two_pairs())
    # NLL: 12 / 4 = 3 and 10 / 5 = 2.
    close(out.metrics["nll_loss"], [3.0, 2.0])
    close(out.metrics["preference_loss"], [0.3132617, 2.1269280])
    close(out.loss_N, [6.0 + 0.003132617, 4.0 + 0.02126928])


def test_without_preference_weight_the_metrics_stay() -> None:
    logps = two_pairs()
    out = objective(preference_weight=0.0, nll_weight=1.0)(logps)
    close(out.loss_N, [3.0, 2.0])
    close(out.metrics["preference_loss"], [0.3132617, 2.1269280])
    close(out.metrics["rewards/chosen"], [-2.0, -0.5])
    out.loss_N.sum().backward()
    # d(12 / 4) = 1/4 and d(10 / 5) = 1/5: the mean is within the pair, not over the microbatch.
    close(logps.nll_sum_N.grad, [0.25, 0.2])
    close(logps.policy[W].grad, [[0.0, 0.0], [0.0, 0.0]])  # type: ignore[list-item]


def test_the_nll_of_chosen_answers_is_a_mean_over_all_turns() -> None:
    logps = two_pairs()
    counts = torch.tensor([[2, 5], [3, 99]])
    logps = replace(logps, token_counts={W: counts, L: counts})
    out = objective(preference_weight=0.0, answer_nll_weight=0.5)(logps)
    # (3 + 4) / (2 + 5) = 1 and 6 / 3 = 2.
    close(out.metrics["answer_nll_loss"], [1.0, 2.0])
    close(out.loss_N, [0.5, 1.0])
    out.loss_N.sum().backward()
    close(logps.policy[W].grad, [[-0.5 / 7, -0.5 / 7], [-0.5 / 3, 0.0]])  # type: ignore[list-item]
    assert "answer_nll_loss" not in objective()(two_pairs()).metrics


def test_without_a_reference_its_logps_are_zero() -> None:
    logps = replace(two_pairs(), reference={})
    out = objective()(logps)
    # z = (-3 - 4) - (-5 - 3) = 1 and -6 + 2 = -4.
    close(out.loss_N, [softplus(-0.5), softplus(2.0)])
    close(out.metrics["rewards/chosen"], [-3.5, -3.0])
    close(out.metrics["rewards/rejected"], [-4.0, -1.0])


@pytest.mark.parametrize("turns", ["summed", "per_turn"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_gradient_is_the_closed_form(turns: str, smoothing: float) -> None:
    """dl/dz = -beta * ((1 - eps) * sigmoid(-beta z) - eps * sigmoid(beta z)), + for the rejected.

    With `summed` every turn of a pair gets the slope at the summed z; with `per_turn` each gets
    the slope at its own z, divided by the number of the pair's turns.
    """
    logps = two_pairs()
    weight = 0.7
    out = objective(turns=turns, label_smoothing=smoothing, preference_weight=weight)(logps)
    out.loss_N.sum().backward()

    def slope(z: float) -> float:
        right, swapped = 1 / (1 + math.exp(BETA * z)), 1 / (1 + math.exp(-BETA * z))
        return -BETA * weight * ((1 - smoothing) * right - smoothing * swapped)

    if turns == "summed":
        expected = [[slope(2.0), slope(2.0)], [slope(-4.0), 0.0]]
    else:
        expected = [[slope(3.0) / 2, slope(-1.0) / 2], [slope(-4.0), 0.0]]
    close(logps.policy[W].grad, expected)  # type: ignore[arg-type]
    close(logps.policy[L].grad, [[-x for x in row] for row in expected])  # type: ignore


@pytest.mark.parametrize("turns", ["summed", "per_turn"])
def test_gradient_by_finite_differences(turns: str) -> None:
    torch.manual_seed(0)
    mask_NT = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    reference_NT = torch.randn(2, 3, 3, dtype=torch.float64)
    loss = objective(turns=turns, label_smoothing=0.2, nll_weight=0.5, preference_weight=0.3)

    def total(chosen_NT: Tensor, rejected_NT: Tensor, nll_sum_N: Tensor) -> Tensor:
        logps = pair_logps(
            mask_NT,
            policy={W: chosen_NT, L: rejected_NT},
            reference={"short_chosen": reference_NT[0], "short_rejected": reference_NT[1]},
            nll=(nll_sum_N, [3, 0, 7]),
        )
        return loss(logps).loss_N

    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(3, 3)] * 2 + [3]
    ]
    assert torch.autograd.gradcheck(total, inputs, eps=1e-6, atol=1e-8)


def test_extreme_z_is_exact_in_float32() -> None:
    """At |beta z| = 1e4 the sigmoid is 0 or 1 in any float type, the loss is |beta z| or 0."""
    z_N = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    out = objective(beta=1.0)(pairs_with_z(z_N))
    out.loss_N.sum().backward()
    close(out.loss_N, [0.0, 1e4, math.log(2)])
    close(z_N.grad, [0.0, -1.0, -0.5])

    z_N = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    out = objective(beta=1.0, label_smoothing=0.1)(pairs_with_z(z_N))
    out.loss_N.sum().backward()
    close(out.loss_N, [1e3, 9e3, math.log(2)])
    # -0.9 * sigmoid(-z) + 0.1 * sigmoid(z)
    close(z_N.grad, [0.1, -0.9, -0.4])


def test_small_z_keeps_its_precision_in_float32() -> None:
    z = torch.tensor([20.0, 40.0, 80.0])
    # log(1 + e^-x) is e^-x to first order; -log(sigmoid(x)) taken apart would round to 0.
    expected = [math.log1p(math.exp(-20)), math.exp(-40), math.exp(-80)]
    loss = logistic_loss(z, beta=1.0, label_smoothing=0.0)
    torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("turns", ["summed", "per_turn"])
def test_a_pair_without_turns_adds_nothing(turns: str) -> None:
    logps = two_pairs()
    mask_NT = torch.tensor([[False, False], [True, False]])
    out = objective(turns=turns)(replace(logps, turn_mask_NT=mask_NT))
    out.loss_N.sum().backward()
    close(out.loss_N, [0.0, softplus(2.0)])
    close(out.metrics["rewards/chosen"], [0.0, -0.5])
    assert logps.policy[W].grad is not None
    close(logps.policy[W].grad[0], [0.0, 0.0])


def test_one_turn_is_the_same_summed_or_apart() -> None:
    logps = pairs_with_z(torch.tensor([0.3, -7.0]))
    close(objective(turns="per_turn")(logps).loss_N, objective()(logps).loss_N.tolist())


def test_gradient_reaches_the_policy_alone() -> None:
    logps = two_pairs()
    reference_NT = logps.reference["short_chosen"].clone().requires_grad_()
    reference: Any = {**logps.reference, "short_chosen": reference_NT}
    out = objective(nll_weight=1.0)(replace(logps, reference=reference))
    out.loss_N.sum().backward()
    assert reference_NT.grad is None
    for part in (
        out.metrics["preference_loss"],
        out.metrics["nll_loss"],
        out.metrics["rewards/chosen"],
        out.metrics["rewards/rejected"],
    ):
        assert part is not None and not part.requires_grad


def test_equal_policy_and_reference_start_at_ln_2() -> None:
    logps = two_pairs()
    out = objective("dpo")(
        replace(logps, reference={row: values.detach() for row, values in logps.policy.items()})
    )
    close(out.loss_N, [math.log(2), math.log(2)])
    close(out.metrics["rewards/chosen"], [0.0, 0.0])


def test_shapes_are_checked_where_logps_are_made() -> None:
    logps = two_pairs()
    for damage in (
        {"policy": {W: logps.policy[W], L: torch.zeros(2, 3)}},
        {"reference": {W: torch.zeros(3, 2)}},
        {"nll_count_N": torch.zeros(3)},
    ):
        changes: Any = damage
        with pytest.raises(AssertionError):
            replace(logps, **changes)
