"""IPO, SimPO, ORPO, SoLoPO, OPSDL and constrained SFT: numbers worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_longpo.objectives import PairLogps
from tests.objectives.logps import objective, pair_logps

W, L, SHORT_W, SHORT_L = "long_chosen", "long_rejected", "short_chosen", "short_rejected"


def softplus(x: float) -> float:
    """log(1 + exp(x)), which is -log sigmoid(-x)."""
    return math.log1p(math.exp(x))


def log_odds(mean_logp: float) -> float:
    p = math.exp(mean_logp)
    return math.log(p / (1 - p))


def exact(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True)


def two_pairs(**more: Any) -> PairLogps:
    """Answers of 2 + 2 and 4 tokens (chosen), 1 + 3 and 2 (rejected); pair 1 lacks turn 1.

                  long chosen   long rejected   short chosen   short rejected
    pair 0        -2, -6        -1, -9          -1, -3         -2, -10
    pair 1        -8            -3              -4             -6
    """
    nan = float("nan")
    return pair_logps(
        [[True, True], [True, False]],
        policy={
            W: exact([[-2.0, -6.0], [-8.0, nan]]),
            L: exact([[-1.0, -9.0], [-3.0, 1e9]]),
            SHORT_W: exact([[-1.0, -3.0], [-4.0, nan]]),
            SHORT_L: exact([[-2.0, -10.0], [-6.0, nan]]),
        },
        reference={
            W: exact([[-3.0, -3.0], [-7.0, nan]]),
            L: exact([[-2.0, -8.0], [-5.0, nan]]),
            SHORT_W: exact([[-1.0, -1.0], [-5.0, nan]]),
            SHORT_L: exact([[-2.0, -6.0], [-6.0, nan]]),
        },
        token_counts={
            W: torch.tensor([[2, 2], [4, 9]]),
            L: torch.tensor([[1, 3], [2, 0]]),
            SHORT_W: torch.tensor([[2, 2], [4, 9]]),
            SHORT_L: torch.tensor([[1, 3], [2, 0]]),
        },
        **more,
    )


def close(actual: Tensor | None, expected: list[float]) -> None:
    assert actual is not None
    assert actual.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_ipo_squares_the_distance_of_mean_log_ratios_from_its_target() -> None:
    # Pair 0: (-8 + 6) / 4 - (-10 + 10) / 4 = -1/2;  pair 1: (-8 + 7) / 4 - (-3 + 5) / 2 = -5/4.
    # The target is 1 / (2 * 1/2) = 1.
    out = objective("ipo")(two_pairs())
    close(out.loss_N, [1.5**2, 2.25**2])
    close(out.metrics["rewards/chosen"], [0.5 * -2 / 4, 0.5 * -1 / 4])
    close(out.metrics["rewards/rejected"], [0.0, 0.5 * 2 / 2])
    # Turn by turn, pair 0: 1/2 - 1 = -1/2 and -3/2 - (-1/3) = -7/6.
    per_turn = objective("ipo", turns="per_turn")(two_pairs())
    close(per_turn.loss_N, [(1.5**2 + (7 / 6 + 1) ** 2) / 2, 2.25**2])


def test_ipo_is_still_at_its_target() -> None:
    logps = two_pairs()
    out = objective("ipo", beta=-1.0 / 2.5)(logps)  # 1 / (2 beta) = -5/4, pair 1's margin
    close(out.loss_N[1:], [0.0])
    out.loss_N[1].backward()
    gradient = logps.policy[W].grad
    assert gradient is not None and gradient[1, 0] == 0


def test_simpo_compares_mean_log_probs_with_a_margin() -> None:
    # beta = 1/2. Pair 0: -8/4 - -10/4 = 1/2 -> 1/4;  pair 1: -8/4 - -3/2 = -1/2 -> -1/4.
    out = objective("simpo", gamma=0.3)(two_pairs())
    close(out.loss_N, [softplus(0.3 - 0.25), softplus(0.3 + 0.25)])
    close(out.metrics["rewards/chosen"], [-1.0, -1.0])
    close(out.metrics["rewards/rejected"], [-1.25, -0.75])
    smoothed = objective("simpo", gamma=0.3, label_smoothing=0.2)(two_pairs())
    close(smoothed.loss_N[:1], [0.8 * softplus(0.05) + 0.2 * softplus(-0.05)])
    # Turn by turn: -2/2 - -1/1 = 0 and -6/2 - -9/3 = 0.
    per_turn = objective("simpo", turns="per_turn")(two_pairs())
    close(per_turn.loss_N, [math.log(2), softplus(0.25)])


def test_orpo_compares_odds_beside_the_nll() -> None:
    nll = (torch.tensor([12.0, 10.0], dtype=torch.float64), [4, 5])
    out = objective("orpo", preference_weight=0.1, nll_weight=1.0)(two_pairs(nll=nll))
    ratios = [log_odds(-2.0) - log_odds(-2.5), log_odds(-2.0) - log_odds(-1.5)]
    close(out.loss_N, [3.0 + 0.1 * softplus(-ratios[0]), 2.0 + 0.1 * softplus(-ratios[1])])
    close(out.metrics["rewards/chosen"], [log_odds(-2.0), log_odds(-2.0)])
    per_turn = objective("orpo", turns="per_turn")(two_pairs(nll=nll))
    close(per_turn.loss_N, [math.log(2), softplus(-ratios[1])])
    # An absent turn has no odds to report.
    close(per_turn.metrics["rewards/chosen"], [log_odds(-1.0) + log_odds(-3.0), log_odds(-2.0)])


def test_orpo_survives_answers_that_are_certain() -> None:
    certain = exact([[0.0]])
    logps = pair_logps(
        [[True]],
        policy={W: certain, L: exact([[-1.0]])},
        token_counts={W: torch.tensor([[3]]), L: torch.tensor([[3]])},
    )
    out = objective("orpo")(logps)
    out.loss_N.sum().backward()
    assert torch.isfinite(out.loss_N).all()
    assert certain.grad is not None and torch.isfinite(certain.grad).all()


def test_solopo_dpo_prefers_on_short_rows_and_aligns_the_chosen_reward() -> None:
    out = objective("solopo_dpo", alignment_weight=3.0)(two_pairs())
    # Short: chosen (-4 + 2) = -2 and (-4 + 5) = 1, rejected (-12 + 8) = -4 and 0; beta = 1/2.
    close(out.metrics["rewards/chosen"], [-1.0, 0.5])
    close(out.metrics["rewards/rejected"], [-2.0, 0.0])
    close(out.metrics["preference_loss"], [softplus(-1.0), softplus(-0.5)])
    # Long: chosen (-8 + 6) = -2 and (-8 + 7) = -1; |-1 - -1| and |1/2 - -1/2|.
    close(out.metrics["alignment_loss"], [0.0, 1.0])
    close(out.loss_N, [softplus(-1.0), softplus(-0.5) + 3.0])
    # Turn by turn, pair 0: short 0, -2 and long 1, -3, so |0 - 1/2| and |-1 - -3/2|.
    per_turn = objective("solopo_dpo", alignment_weight=1.0, turns="per_turn")(two_pairs())
    close(per_turn.metrics["alignment_loss"], [0.5, 1.0])


def test_solopo_leaves_the_rejected_long_row_alone() -> None:
    for name in ("solopo_dpo", "solopo_simpo", "solopo_orpo"):
        logps = two_pairs()
        objective(name, alignment_weight=0.7)(logps).loss_N.sum().backward()
        assert logps.policy[L].grad is None
        for row in (W, SHORT_W, SHORT_L):
            gradient = logps.policy[row].grad  # type: ignore[index]
            assert gradient is not None and gradient[1, 0] != 0, (name, row)
            assert gradient[1, 1] == 0, "an absent turn"
        assert all(values.grad is None for values in logps.reference.values())


def test_solopo_simpo_and_orpo_take_their_own_rewards() -> None:
    simpo = objective("solopo_simpo", gamma=0.3, alignment_weight=1.0)(two_pairs())
    # Short: -4/4 - -12/4 = 2 -> 1 and -4/4 - -6/2 = 2 -> 1; |1/2 (-1 + 2)| for both.
    close(simpo.metrics["preference_loss"], [softplus(-0.7), softplus(-0.7)])
    close(simpo.metrics["alignment_loss"], [0.5, 0.5])
    nll = (torch.tensor([12.0, 10.0], dtype=torch.float64), [4, 5])
    orpo = objective("solopo_orpo", preference_weight=0.1, nll_weight=1.0)(two_pairs(nll=nll))
    preference = softplus(-(log_odds(-1.0) - log_odds(-3.0)))
    gap = log_odds(-1.0) - log_odds(-2.0)
    close(orpo.metrics["alignment_loss"], [gap, gap])
    close(orpo.loss_N, [3.0 + 0.1 * preference + gap, 2.0 + 0.1 * preference + gap])


def test_opsdl_is_the_mean_divergence_of_its_tokens() -> None:
    sums = torch.tensor([6.0, 5.0, 0.0], dtype=torch.float64, requires_grad=True)
    logps = pair_logps([[True]] * 3, divergence=(sums, [3, 2, 0]))
    out = objective("opsdl", divergence_weight=0.5)(logps)
    close(out.loss_N, [1.0, 1.25, 0.0])
    close(out.metrics["divergence_loss"], [2.0, 2.5, 0.0])
    out.loss_N.sum().backward()
    close(sums.grad, [0.5 / 3, 0.5 / 2, 0.0])
    assert set(out.metrics) == {"divergence_loss"}


def test_sft_with_the_constraint_is_nll_and_divergence() -> None:
    both = {
        "nll": (torch.tensor([6.0, 10.0], dtype=torch.float64), [3, 4]),
        "divergence": (torch.tensor([6.0, 5.0], dtype=torch.float64), [3, 2]),
    }
    logps = pair_logps([[True]] * 2, **both)  # type: ignore[arg-type]
    out = objective("sft_short_to_long", nll_weight=2.0, divergence_weight=0.1)(logps)
    close(out.loss_N, [2 * 2.0 + 0.1 * 2.0, 2 * 2.5 + 0.1 * 2.5])
    alone = objective("sft_short_to_long", nll_weight=0.0, divergence_weight=0.1)(logps)
    close(alone.loss_N, [0.2, 0.25])
    assert "nll_loss" not in alone.metrics
