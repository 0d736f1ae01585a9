"""OPSDL: the model under the short chunk teaches itself under the long document."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_longpo.config.names import AnswerScope

from .preference import context_row
from .turns import mean_over_tokens
from .types import Branch, Context, LossOutput, Needs, Objective, PairLogps


@dataclass(frozen=True, kw_only=True, slots=True)
class OPSDL(Objective):
    """L_n = divergence_weight * mean over the answer's tokens t of

        KL( pi_theta(. | long document, y_<t) || pi_ref(. | short chunk, y_<t) )

    Source: OPSDL (arXiv 2604.17535), the reverse KL of each token, here of the whole next-token
    distributions. The paper's student writes y under the long document during training. Here y is
    the rejected answer of the row, which the model wrote under the long document before training.
    No answer is preferred: each token is compared with the teacher's distribution.
    """

    divergence_weight: float
    divergence_scope: AnswerScope
    reference_context: Context

    @property
    def needs(self) -> Needs:
        branch: Branch = "chosen" if self.divergence_scope == "chosen_answers" else "rejected"
        teacher = context_row(self.reference_context, branch)
        return Needs(divergence=(context_row("long", branch), teacher))

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Returns the loss of each pair; of `logps` only the divergence fields are read."""
        divergence_N = mean_over_tokens(logps.divergence_sum_N, logps.divergence_count_N)
        return LossOutput(
            loss_N=self.divergence_weight * divergence_N,
            metrics={"divergence_loss": divergence_N.detach()},
        )
