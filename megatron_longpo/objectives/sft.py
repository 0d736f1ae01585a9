"""Supervised fine-tuning on one branch, with or without a KL to the short-context model."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_longpo.config.names import NllScope, NllTokens

from .preference import context_row
from .turns import mean_over_tokens
from .types import Branch, Context, LossOutput, Needs, Objective, PairLogps


@dataclass(frozen=True, kw_only=True, slots=True)
class SFT(Objective):
    """L_n = nll_weight * NLL_n on the long row of one branch.

    Source: the SFT baselines of LongPO (arXiv 2502.13922): long input, chosen (or rejected)
    answers. No reference, no preference term, no rewards.
    """

    nll_weight: float
    nll_scope: NllScope
    branch: Branch

    @property
    def needs(self) -> Needs:
        tokens: NllTokens = self.nll_scope if self.branch == "chosen" else "rejected_answers"
        return Needs(nll=tokens)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Returns the loss of each pair; of `logps` only the NLL fields are read."""
        nll_N = mean_over_tokens(logps.nll_sum_N, logps.nll_count_N)
        return LossOutput(loss_N=self.nll_weight * nll_N, metrics={"nll_loss": nll_N.detach()})


@dataclass(frozen=True, kw_only=True, slots=True)
class ConstrainedSFT(Objective):
    """L_n = nll_weight * NLL_n + divergence_weight * D_n on the chosen row,

        D = mean over the answer's tokens t of
            KL( pi_theta(. | long document, y_<t) || pi_ref(. | short chunk, y_<t) )

    Source: the SFT baseline with the short-to-long constraint of LongPO (arXiv 2502.13922). The
    paper states the constraint as that KL, in the objective that LongPO's loss is derived from, and
    gives no formula for SFT. So the KL of whole next-token distributions is added to the NLL. It is
    exact; a log-ratio of the answer's tokens would only estimate it, would be negative half of the
    time, and would need answers that the policy sampled.
    """

    nll_weight: float
    nll_scope: NllScope
    divergence_weight: float
    reference_context: Context

    @property
    def needs(self) -> Needs:
        return Needs(
            nll=self.nll_scope if self.nll_weight else None,
            divergence=("long_chosen", context_row(self.reference_context, "chosen")),
        )

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Returns the loss of each pair; an NLL whose weight is 0 is left out."""
        divergence_N = mean_over_tokens(logps.divergence_sum_N, logps.divergence_count_N)
        loss_N = self.divergence_weight * divergence_N
        metrics = {"divergence_loss": divergence_N.detach()}
        if self.nll_weight:
            nll_N = mean_over_tokens(logps.nll_sum_N, logps.nll_count_N)
            loss_N = loss_N + self.nll_weight * nll_N
            metrics["nll_loss"] = nll_N.detach()
        return LossOutput(loss_N=loss_N, metrics=metrics)
