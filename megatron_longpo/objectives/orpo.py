"""ORPO: imitation and a comparison of odds in one loss, without a reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_longpo.config.names import RowName, Turns

from .preference import Comparison, LongPreference, logistic_loss
from .turns import token_mean
from .types import PairLogps


@dataclass(frozen=True, kw_only=True, slots=True)
class ORPO(LongPreference):
    """L_n = nll_weight * NLL_n + preference_weight * mean_u -log sigmoid( r_w - r_l ),

        r = log( p / (1 - p) ),  p = exp( log pi_theta(y | long) / |y| )

    Source: Equations 6 and 7 of ORPO (arXiv 2403.07691); `preference_weight` is its lambda.
    """

    def compare(self, logps: PairLogps) -> Comparison:
        chosen_NU, rejected_NU = (log_odds(logps, row, turns=self.turns) for row in self.compared)
        return odds_comparison(chosen_NU, rejected_NU)


def log_odds(logps: PairLogps, row: RowName, *, turns: Turns) -> Tensor:
    """Returns an answer's log-odds from its mean log-prob a token, `-> [N, U]`, in nats.

    A unit without tokens has p = 1. Like a certain answer it gets the largest odds that the float
    type can tell from infinity.
    """
    mean_NU = token_mean(logps.policy[row], logps.token_counts[row], logps.turn_mask_NT, turns)
    impossible_NU = -torch.expm1(mean_NU)
    return mean_NU - impossible_NU.clamp(min=torch.finfo(mean_NU.dtype).eps).log()


def odds_comparison(chosen_NU: Tensor, rejected_NU: Tensor) -> Comparison:
    """Returns -log sigmoid of the log-odds ratio."""
    return Comparison(
        losses_NU=logistic_loss(chosen_NU - rejected_NU, beta=1.0, label_smoothing=0.0),
        chosen_rewards_NU=chosen_NU,
        rejected_rewards_NU=rejected_NU,
    )
