"""SimPO: length-normalised log-probs with a target margin, and no reference."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_longpo.config.names import RowName, Turns

from .preference import Comparison, LongPreference, logistic_loss
from .turns import token_mean
from .types import PairLogps


@dataclass(frozen=True, kw_only=True, slots=True)
class SimPO(LongPreference):
    """L_n = preference_weight * mean_u l( r_w - r_l - gamma ) + nll_weight * NLL_n,

        r = beta * log pi_theta(y | long) / |y|

    Source: Equation 6 of SimPO (arXiv 2405.14734); l is the logistic loss of `preference.py`.
    """

    beta: float
    gamma: float
    label_smoothing: float

    def compare(self, logps: PairLogps) -> Comparison:
        chosen_NU, rejected_NU = (
            mean_logp_reward(logps, row, beta=self.beta, turns=self.turns) for row in self.compared
        )
        return margin_comparison(
            chosen_NU, rejected_NU, gamma=self.gamma, label_smoothing=self.label_smoothing
        )


def mean_logp_reward(logps: PairLogps, row: RowName, *, beta: float, turns: Turns) -> Tensor:
    """Returns beta * mean log-prob of a token, `-> [N, U]`."""
    return beta * token_mean(logps.policy[row], logps.token_counts[row], logps.turn_mask_NT, turns)


def margin_comparison(
    chosen_NU: Tensor, rejected_NU: Tensor, *, gamma: float, label_smoothing: float
) -> Comparison:
    """Returns the logistic loss of rewards whose target difference is gamma."""
    return Comparison(
        losses_NU=logistic_loss(
            chosen_NU - rejected_NU - gamma, beta=1.0, label_smoothing=label_smoothing
        ),
        chosen_rewards_NU=chosen_NU,
        rejected_rewards_NU=rejected_NU,
    )
