"""LongPO: prefer the answer given under the short chunk, on the long document."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .sft import mean_nll
from .types import LossOutput, Needs, Objective, PairLogps, Turns


def log_ratio(policy_NT: Tensor, reference_NT: Tensor | None, turn_mask_NT: Tensor) -> Tensor:
    """r_nt = log pi_theta - log pi_ref of a turn's answer, and 0 where the turn is absent.

    `[N, T], [N, T] | None, [N, T] -> [N, T]`. Without a reference its log-prob counts as 0.
    """
    ratio_NT = policy_NT if reference_NT is None else policy_NT - reference_NT.detach()
    return torch.where(turn_mask_NT, ratio_NT, torch.zeros_like(ratio_NT))


def logistic_loss(z: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """l(z) = -(1 - eps) * log sigmoid(beta z) - eps * log sigmoid(-beta z), element by element.

    eps = `label_smoothing` is the chance that a pair's labels are swapped (conservative DPO;
    a note by E. Mitchell on arXiv 2305.18290). With eps = 0 it is Equation 7 of that paper.
    `logsigmoid` stays finite, and so does its gradient, where `sigmoid` has rounded to 0.
    """
    loss = -(1.0 - label_smoothing) * F.logsigmoid(beta * z)
    if label_smoothing:
        loss = loss - label_smoothing * F.logsigmoid(-beta * z)
    return loss


def preference_loss(
    z_NT: Tensor, turn_mask_NT: Tensor, *, beta: float, label_smoothing: float, turns: Turns
) -> Tensor:
    """One number a pair out of the turns' z = chosen log-ratio - rejected log-ratio.

    `[N, T], [N, T] -> [N]`, with l from `logistic_loss`:

        summed:    l( sum_t z_nt )            one logistic a pair; the loss as trained
        per_turn:  mean_t l( z_nt )           one logistic a turn, over the pair's own turns

    `z_NT` is 0 where the turn is absent. A pair without any turn contributes 0 in both.
    """
    num_turns_N = turn_mask_NT.sum(dim=1)
    if turns == "summed":
        loss_N = logistic_loss(z_NT.sum(dim=1), beta=beta, label_smoothing=label_smoothing)
        return torch.where(num_turns_N > 0, loss_N, torch.zeros_like(loss_N))
    loss_NT = logistic_loss(z_NT, beta=beta, label_smoothing=label_smoothing)
    loss_NT = torch.where(turn_mask_NT, loss_NT, torch.zeros_like(loss_NT))
    return loss_NT.sum(dim=1) / num_turns_N.clamp(min=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class LongPO(Objective):
    """L_n = nll_weight * NLL_n + preference_weight * l( (P_w - R_w) - (P_l - R_l) ).

        P_w, P_l   policy log-probs of the chosen and rejected answers, given the long document
        R_w, R_l   reference log-probs of the same answers, given the short chunk

    Source: LongPO (arXiv 2502.13922), the short-to-long constraint put into the DPO loss, plus
    the language-modelling term of its public code, where `preference_weight` is lambda. That
    the reference saw the short chunk is the data's doing (`reference.context: short`): nothing
    here depends on it.

    Where `reference.mode` is `none`, R_w = R_l = 0: the preference is over plain log-probs.
    `preference_weight: 0` leaves NLL alone to train; the preference loss and the rewards are
    still reported. `nll_weight: 0` drops the NLL term from the work and from the report.
    """

    @property
    def needs(self) -> Needs:
        return Needs(
            branches=("chosen", "rejected"),
            preference=True,
            reference=True,
            nll=self.nll_scope if self.nll_weight else None,
        )

    def __call__(self, logps: PairLogps) -> LossOutput:
        """`PairLogps -> LossOutput`, all parts present but NLL where its weight is 0."""
        mask_NT = logps.turn_mask_NT
        chosen_NT = log_ratio(logps.policy_chosen_NT, logps.reference_chosen_NT, mask_NT)
        rejected_NT = log_ratio(logps.policy_rejected_NT, logps.reference_rejected_NT, mask_NT)
        preference_N = preference_loss(
            chosen_NT - rejected_NT,
            mask_NT,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            turns=self.turns,
        )
        loss_N = self.preference_weight * preference_N
        nll_N = None
        if self.nll_weight:
            nll_N = mean_nll(logps.nll_sum_N, logps.nll_count_N)
            loss_N = loss_N + self.nll_weight * nll_N
        return LossOutput(
            loss_N=loss_N,
            preference_loss_N=preference_N.detach(),
            nll_loss_N=None if nll_N is None else nll_N.detach(),
            chosen_rewards_N=self.beta * chosen_NT.detach().sum(dim=1),
            rejected_rewards_N=self.beta * rejected_NT.detach().sum(dim=1),
        )
