"""LongPO: on the long document, prefer the answer that was given under the short chunk."""

from __future__ import annotations

from dataclasses import dataclass

from .preference import Comparison, ReferencedPreference, log_ratio, logistic_loss
from .turns import per_unit
from .types import PairLogps


@dataclass(frozen=True, kw_only=True, slots=True)
class LongPO(ReferencedPreference):
    """L_n = nll_weight * NLL_n + preference_weight * l( (P_w - R_w) - (P_l - R_l) ).

        P_w, P_l   policy log-probs of the chosen and rejected answers, given the long document
        R_w, R_l   reference log-probs of the same answers, given the short chunk

    Source: LongPO (arXiv 2502.13922), the DPO loss with the short-to-long constraint, plus the
    language-modelling term of its public code, where `preference_weight` is lambda. With several
    turns the logistic takes their sum, as LongPO was trained, or (`per_turn`) each turn, averaged
    over the pair's own turns.

    If `reference.mode` is `none`, R_w = R_l = 0: the preference is over plain log-probs.
    """

    label_smoothing: float

    def compare(self, logps: PairLogps) -> Comparison:
        chosen_NU, rejected_NU = (
            per_unit(log_ratio(logps, row, reference_row), logps.turn_mask_NT, self.turns)
            for row, reference_row in zip(self.compared, self.reference_rows, strict=True)
        )
        return Comparison(
            losses_NU=logistic_loss(
                chosen_NU - rejected_NU, beta=self.beta, label_smoothing=self.label_smoothing
            ),
            chosen_rewards_NU=self.beta * chosen_NU,
            rejected_rewards_NU=self.beta * rejected_NU,
        )
