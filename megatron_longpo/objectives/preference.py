"""The common part of objectives that compare a chosen with a rejected answer.

Letters: N pairs, T turns, U units: a pair's conversation or its turns, see `turns.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from megatron_longpo.config.names import NllScope, NllTokens, RowName, Turns

from .turns import mean_over_tokens, mean_over_units, sum_over_units, token_mean
from .types import Branch, Context, LossOutput, Needs, Objective, PairLogps


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A preference by unit: its loss, and the numbers that it compares."""

    losses_NU: Tensor
    """[N, U] float, with gradient, unweighted."""
    chosen_rewards_NU: Tensor
    """[N, U] float: what the loss compares."""
    rejected_rewards_NU: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference(Objective):
    """L_n = nll_weight * NLL_n + preference_weight * mean over units of the comparison's loss
          + answer_nll_weight * mean over the chosen answers' tokens of -log pi_theta.

    With `preference_weight: 0` only NLL trains; the preference loss and the rewards are still
    reported. With `nll_weight: 0` the NLL term is neither computed nor reported.

    A preference compares differences, and may make less likely what both answers have in common,
    such as the token that ends them (likelihood displacement, arXiv 2410.08847). NLL of a whole
    long row hardly prevents it, since few of its tokens are answers; `answer_nll_weight` does (the
    NLL term of arXiv 2404.19733, over all turns' tokens).
    """

    preference_weight: float
    nll_weight: float
    nll_scope: NllScope
    answer_nll_weight: float
    turns: Turns

    @property
    @abstractmethod
    def compared(self) -> tuple[RowName, RowName]: ...

    @abstractmethod
    def compare(self, logps: PairLogps) -> Comparison: ...

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Returns the loss of each pair; an NLL whose weight is 0 is left out."""
        comparison = self.compare(logps)
        preference_N = mean_over_units(comparison.losses_NU, logps.turn_mask_NT, self.turns)
        loss_N = self.preference_weight * preference_N
        metrics = {
            "preference_loss": preference_N.detach(),
            **reward_metrics(
                self._total(comparison.chosen_rewards_NU, logps),
                self._total(comparison.rejected_rewards_NU, logps),
            ),
        }
        if self.nll_weight:
            nll_N = mean_over_tokens(logps.nll_sum_N, logps.nll_count_N)
            loss_N = loss_N + self.nll_weight * nll_N
            metrics["nll_loss"] = nll_N.detach()
        if self.answer_nll_weight:
            answer_nll_N = self._answer_nll(logps)
            loss_N = loss_N + self.answer_nll_weight * answer_nll_N
            metrics["answer_nll_loss"] = answer_nll_N.detach()
        return LossOutput(loss_N=loss_N, metrics=metrics)

    def _answer_nll(self, logps: PairLogps) -> Tensor:
        """Returns the mean NLL of an answer token, `-> [N]`, in the chosen row that is compared."""
        chosen, _ = self.compared
        mean_N1 = token_mean(
            logps.policy[chosen], logps.token_counts[chosen], logps.turn_mask_NT, "summed"
        )
        return -mean_N1.squeeze(1)

    def _total(self, rewards_NU: Tensor, logps: PairLogps) -> Tensor:
        return sum_over_units(rewards_NU.detach(), logps.turn_mask_NT, self.turns)


@dataclass(frozen=True, kw_only=True, slots=True)
class LongPreference(Preference):
    """A preference between the answers to the long document."""

    @property
    def needs(self) -> Needs:
        return Needs(policy=self.compared, nll=self.nll_tokens)

    @property
    def nll_tokens(self) -> NllTokens | None:
        return self.nll_scope if self.nll_weight else None

    @property
    def compared(self) -> tuple[RowName, RowName]:
        return "long_chosen", "long_rejected"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferencedPreference(LongPreference):
    """A preference between answers to the long document, relative to a reference.

    The reference reads the short or the long context.
    """

    beta: float
    reference_context: Context

    @property
    def needs(self) -> Needs:
        return Needs(
            policy=self.compared,
            reference=self.reference_rows,
            nll=self.nll_tokens,
        )

    @property
    def reference_rows(self) -> tuple[RowName, RowName]:
        context = self.reference_context
        return context_row(context, "chosen"), context_row(context, "rejected")


def reward_metrics(chosen_N: Tensor, rejected_N: Tensor) -> dict[str, Tensor]:
    """Returns the metrics of rewards, detached and summed over a pair's turns, each `[N]`."""
    margins_N = chosen_N - rejected_N
    return {
        "rewards/chosen": chosen_N,
        "rewards/rejected": rejected_N,
        "rewards/margins": margins_N,
        "rewards/accuracies": margins_N > 0,
    }


def context_row(context: Context, branch: Branch) -> RowName:
    """Returns the name of a branch's answer under a context."""
    rows: dict[tuple[Context, Branch], RowName] = {
        ("short", "chosen"): "short_chosen",
        ("short", "rejected"): "short_rejected",
        ("long", "chosen"): "long_chosen",
        ("long", "rejected"): "long_rejected",
    }
    return rows[context, branch]


def log_ratio(logps: PairLogps, row: RowName, reference_row: RowName) -> Tensor:
    """Returns log pi_theta(y | row) - log pi_ref(y | reference_row) of each turn's answer.

    `-> [N, T]`, meaningless if the turn is absent. Without a reference its log-prob counts as 0.
    """
    policy_NT = logps.policy[row]
    if reference_row not in logps.reference:
        return policy_NT
    return policy_NT - logps.reference[reference_row].detach()


def logistic_loss(z: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Returns l(z) = -(1 - eps) * log sigmoid(beta z) - eps * log sigmoid(-beta z), elementwise.

    eps = `label_smoothing` is the chance that a pair's labels are swapped (conservative DPO;
    a note by E. Mitchell on arXiv 2305.18290). With eps = 0 it is Equation 7 of that paper.
    `logsigmoid` and its gradient stay finite where `sigmoid` rounds to 0.
    """
    loss = -(1.0 - label_smoothing) * F.logsigmoid(beta * z)
    if label_smoothing:
        loss = loss - label_smoothing * F.logsigmoid(-beta * z)
    return loss
