"""Supervised fine-tuning on one branch, and the NLL term that other objectives share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .types import Branch, LossOutput, Needs, NllTokens, Objective, PairLogps


def mean_nll(nll_sum_N: Tensor, nll_count_N: Tensor) -> Tensor:
    """NLL_n = nll_sum_n / nll_count_n, and 0 (with zero gradient) where the count is 0.

    `[N], [N] -> [N]`. Source: LongPO (arXiv 2502.13922), the language-modelling term of the loss
    as trained; the public code also divides over padding, which has no place here.
    """
    # The clamp keeps 0 / 0 out of the branch that `where` drops: its backward would be NaN.
    mean_N = nll_sum_N / nll_count_N.clamp(min=1)
    return torch.where(nll_count_N > 0, mean_N, torch.zeros_like(mean_N))


@dataclass(frozen=True, kw_only=True, slots=True)
class SFT(Objective):
    """L_n = nll_weight * NLL_n on the long row of one branch.

    Source: the SFT baselines of LongPO (arXiv 2502.13922): long input, chosen (or rejected)
    answers. No reference, no preference term, no rewards.
    """

    branch: Branch

    @property
    def needs(self) -> Needs:
        tokens: NllTokens = self.nll_scope if self.branch == "chosen" else "rejected_answers"
        return Needs(branches=(self.branch,), preference=False, reference=False, nll=tokens)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """`PairLogps -> LossOutput`; only the two NLL fields are read."""
        nll_N = mean_nll(logps.nll_sum_N, logps.nll_count_N)
        return LossOutput(
            loss_N=self.nll_weight * nll_N,
            preference_loss_N=None,
            nll_loss_N=nll_N.detach(),
            chosen_rewards_N=None,
            rejected_rewards_N=None,
        )
