"""What an objective is given, what it gives back, and what it asks for.

Letters: N = pairs of a microbatch, T = most turns among them. Log-probs are sums over answer
tokens, in nats, in the float type that the log-prob head hands over (float32 in training).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Branch = Literal["chosen", "rejected"]
NllScope = Literal["chosen_row", "chosen_answers"]
NllTokens = Literal["chosen_row", "chosen_answers", "rejected_answers"]
Turns = Literal["summed", "per_turn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairLogps:
    """Everything a loss is a function of. The log-prob head makes it, once a microbatch."""

    policy_chosen_NT: Tensor
    """[N, T] float, with gradient: sum over the answer tokens of the turn of log pi_theta."""
    policy_rejected_NT: Tensor
    """[N, T] float, with gradient."""
    reference_chosen_NT: Tensor | None
    """[N, T] float, no gradient. None = no reference: its log-probs count as 0."""
    reference_rejected_NT: Tensor | None
    """[N, T] float, no gradient. None exactly where `reference_chosen_NT` is None."""
    turn_mask_NT: Tensor
    """[N, T] bool, True where the pair has that turn. What stands elsewhere is never read."""
    nll_sum_N: Tensor
    """[N] float, with gradient: sum of -log pi_theta over the tokens of `Needs.nll`."""
    nll_count_N: Tensor
    """[N] int64: their number."""

    def __post_init__(self) -> None:
        shape = self.turn_mask_NT.shape
        assert (self.reference_chosen_NT is None) == (self.reference_rejected_NT is None)
        for logps_NT in (
            self.policy_chosen_NT,
            self.policy_rejected_NT,
            self.reference_chosen_NT,
            self.reference_rejected_NT,
        ):
            assert logps_NT is None or logps_NT.shape == shape, (logps_NT.shape, shape)
        assert self.nll_sum_N.shape == self.nll_count_N.shape == shape[:1]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """A loss a pair; the mean over the global batch's pairs is taken by the caller.

    A part is None where the objective does not have it.
    """

    loss_N: Tensor
    """[N] float, with gradient: the weighted sum of the parts."""
    preference_loss_N: Tensor | None
    """[N] float, unweighted, detached."""
    nll_loss_N: Tensor | None
    """[N] float, unweighted, detached: mean over the NLL tokens of the pair."""
    chosen_rewards_N: Tensor | None
    """[N] float, detached: beta * (policy - reference), summed over turns."""
    rejected_rewards_N: Tensor | None
    """[N] float, detached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What the pack and the log-prob head have to provide for an objective."""

    branches: tuple[Branch, ...]
    """Long rows that the policy scores."""
    preference: bool
    """Whether the per-turn log-probs of both branches enter the loss or its metrics."""
    reference: bool
    """Whether reference log-probs are used where `reference.mode` provides them."""
    nll: NllTokens | None
    """Tokens of the NLL term; None = no such term."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective(ABC):
    """Settings of `objective.*`, callable on `PairLogps`."""

    beta: float
    """Temperature of the preference term and scale of the rewards."""
    preference_weight: float
    nll_weight: float
    nll_scope: NllScope
    turns: Turns
    label_smoothing: float

    @property
    @abstractmethod
    def needs(self) -> Needs: ...

    @abstractmethod
    def __call__(self, logps: PairLogps) -> LossOutput: ...
