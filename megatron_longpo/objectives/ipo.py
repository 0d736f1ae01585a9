"""IPO: a squared comparison; unlike a logistic one it does not push clear pairs apart forever."""

from __future__ import annotations

from dataclasses import dataclass

from .preference import Comparison, ReferencedPreference, log_ratio
from .turns import token_mean
from .types import PairLogps


@dataclass(frozen=True, kw_only=True, slots=True)
class IPO(ReferencedPreference):
    """L_n = preference_weight * mean_u ( h_u - 1 / (2 beta) )^2 + nll_weight * NLL_n,

        h = (P_w - R_w) / |y_w| - (P_l - R_l) / |y_l|

    Source: Equation 17 of IPO (arXiv 2310.12036), beta its tau. The log-ratios are means over the
    answer's tokens, as TRL computes them on the authors' advice: with sums over hundreds of
    tokens the square would depend mostly on the length. Rows and defaults are `DPO`'s.
    """

    def compare(self, logps: PairLogps) -> Comparison:
        chosen_NU, rejected_NU = (
            token_mean(
                log_ratio(logps, row, reference_row),
                logps.token_counts[row],
                logps.turn_mask_NT,
                self.turns,
            )
            for row, reference_row in zip(self.compared, self.reference_rows, strict=True)
        )
        margins_NU = chosen_NU - rejected_NU
        return Comparison(
            losses_NU=(margins_NU - 1.0 / (2.0 * self.beta)).square(),
            chosen_rewards_NU=self.beta * chosen_NU,
            rejected_rewards_NU=self.beta * rejected_NU,
        )
