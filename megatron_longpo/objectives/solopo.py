"""SoLoPO: learn the preference on short chunks, and align the long chosen answer's reward."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from megatron_longpo.config.names import NllTokens, RowName

from .orpo import log_odds, odds_comparison
from .preference import Comparison, Preference, log_ratio, logistic_loss
from .simpo import margin_comparison, mean_logp_reward
from .turns import mean_over_units, per_unit
from .types import LossOutput, Needs, PairLogps


@dataclass(frozen=True, kw_only=True, slots=True)
class SoLoPO(Preference):
    """L_n = L_pref(short rows) + alignment_weight * mean_u |r(short, y_w) - r(long, y_w)|.

    Source: SoLoPO (arXiv 2505.11166), `alignment_weight` its alpha. The policy reads the short
    rows with gradient, under its own RoPE. Only the chosen answer's reward is aligned. Each
    flavour has its own reward r and loss. An NLL term uses the chosen answers in the short rows.
    """

    alignment_weight: float

    @property
    def needs(self) -> Needs:
        return Needs(policy=self.rows, nll=self._nll)

    @property
    def rows(self) -> tuple[RowName, ...]:
        """Rows that the policy reads, and the reference too if the flavour has one."""
        return *self.compared, "long_chosen"

    @property
    def _nll(self) -> NllTokens | None:
        return "short_chosen_answers" if self.nll_weight else None

    @property
    def compared(self) -> tuple[RowName, RowName]:
        return "short_chosen", "short_rejected"

    @abstractmethod
    def reward(self, logps: PairLogps, row: RowName) -> Tensor:
        """Returns r of a row's answers, `-> [N, U]`, with gradient."""

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Returns the loss of each pair; an NLL whose weight is 0 is left out."""
        output = Preference.__call__(self, logps)
        gaps_NU = (self.reward(logps, "short_chosen") - self.reward(logps, "long_chosen")).abs()
        alignment_N = mean_over_units(gaps_NU, logps.turn_mask_NT, self.turns)
        return LossOutput(
            loss_N=output.loss_N + self.alignment_weight * alignment_N,
            metrics={**output.metrics, "alignment_loss": alignment_N.detach()},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SoLoDPO(SoLoPO):
    """r = beta * (log pi_theta - log pi_ref), both under the row's own context; DPO's logistic."""

    beta: float
    label_smoothing: float

    @property
    def needs(self) -> Needs:
        return Needs(policy=self.rows, reference=self.rows, nll=self._nll)

    def reward(self, logps: PairLogps, row: RowName) -> Tensor:
        ratio_NT = log_ratio(logps, row, row)
        return self.beta * per_unit(ratio_NT, logps.turn_mask_NT, self.turns)

    def compare(self, logps: PairLogps) -> Comparison:
        chosen_NU, rejected_NU = (self.reward(logps, row) for row in self.compared)
        return Comparison(
            losses_NU=logistic_loss(
                chosen_NU - rejected_NU, beta=1.0, label_smoothing=self.label_smoothing
            ),
            chosen_rewards_NU=chosen_NU,
            rejected_rewards_NU=rejected_NU,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SoLoSimPO(SoLoPO):
    """r = beta * mean log-prob of a token; SimPO's logistic with the margin gamma."""

    beta: float
    gamma: float
    label_smoothing: float

    def reward(self, logps: PairLogps, row: RowName) -> Tensor:
        return mean_logp_reward(logps, row, beta=self.beta, turns=self.turns)

    def compare(self, logps: PairLogps) -> Comparison:
        chosen_NU, rejected_NU = (self.reward(logps, row) for row in self.compared)
        return margin_comparison(
            chosen_NU, rejected_NU, gamma=self.gamma, label_smoothing=self.label_smoothing
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SoLoORPO(SoLoPO):
    """r = log-odds of the answer; ORPO's odds ratio, beside the NLL of the short chosen answers."""

    def reward(self, logps: PairLogps, row: RowName) -> Tensor:
        return log_odds(logps, row, turns=self.turns)

    def compare(self, logps: PairLogps) -> Comparison:
        chosen_NU, rejected_NU = (self.reward(logps, row) for row in self.compared)
        return odds_comparison(chosen_NU, rejected_NU)
