"""The input of an objective, its output, and what it needs from pack and head.

Letters: N = pairs of a microbatch, T = most turns among them. Log-probs are sums over answer
tokens, in nats, in the float type of the input (float64 in training).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megatron_longpo.config.names import NllTokens, RowName

Branch = Literal["chosen", "rejected"]
Context = Literal["short", "long"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairLogps:
    """The input of a loss. The log-prob head makes it, once a microbatch."""

    policy: Mapping[RowName, Tensor]
    """For each row of `Needs.policy` [N, T] float, with gradient: sum over the answer tokens of
    the turn of log pi_theta."""
    reference: Mapping[RowName, Tensor]
    """For each row of `Needs.reference` [N, T] float, no gradient. Empty = no reference: its
    log-probs count as 0."""
    token_counts: Mapping[RowName, Tensor]
    """For each row of `Needs.policy` [N, T] int64: the answer tokens that the sum is over."""
    turn_mask_NT: Tensor
    """[N, T] bool, True where the pair has that turn. Values elsewhere are never read."""
    nll_sum_N: Tensor
    """[N] float, with gradient: sum of -log pi_theta over the tokens of `Needs.nll`."""
    nll_count_N: Tensor
    """[N] int64: their number."""
    divergence_sum_N: Tensor
    """[N] float, with gradient: sum of the reverse KL over the tokens of `Needs.divergence`."""
    divergence_count_N: Tensor
    """[N] int64: their number."""

    def __post_init__(self) -> None:
        shape = self.turn_mask_NT.shape
        for rows in (self.policy, self.reference, self.token_counts):
            for name, values_NT in rows.items():
                assert values_NT.shape == shape, (name, values_NT.shape, shape)
        for values_N in (
            self.nll_sum_N,
            self.nll_count_N,
            self.divergence_sum_N,
            self.divergence_count_N,
        ):
            assert values_N.shape == shape[:1]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """The loss of every pair, and the numbers to report of it.

    The caller takes the mean of each over the pairs of the global batch.
    """

    loss_N: Tensor
    """[N] float, with gradient: the weighted sum of the parts."""
    metrics: Mapping[str, Tensor]
    """Name in metrics.jsonl -> [N], detached. Parts of the loss end in `_loss` and are unweighted;
    the console and `longpo report` show them. A name that the objective does not give is null in
    metrics.jsonl if contract section 5 lists it, and absent otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Log-probs and divergences that the pack and the log-prob head provide for an objective."""

    policy: tuple[RowName, ...] = ()
    """Rows whose per-turn log-probs of the policy enter the loss or its metrics, with gradient."""
    reference: tuple[RowName, ...] = ()
    """Rows whose per-turn log-probs of the reference are used, if there is a reference."""
    nll: NllTokens | None = None
    """Tokens of the NLL term; None = no such term."""
    divergence: tuple[RowName, RowName] | None = None
    """KL(policy || reference) of the next-token distributions along an answer that both read: the
    policy in the first row, the reference in the second. None = no such term."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective(ABC):
    """A loss with its keys of the section `objective`, callable on `PairLogps`."""

    @property
    @abstractmethod
    def needs(self) -> Needs: ...

    @property
    def compared(self) -> tuple[RowName, RowName] | None:
        """The chosen and the rejected row that the preference compares; None = it has none."""
        return None

    @abstractmethod
    def __call__(self, logps: PairLogps) -> LossOutput: ...
