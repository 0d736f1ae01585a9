"""Sums turns into the units that a preference compares; means are finite without any turn.

A unit is a pair's whole conversation (`turns: summed`, U = 1) or one turn (`per_turn`, U = T).

Letters: N pairs, T turns, U units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_longpo.config.names import Turns


def per_unit(values_NT: Tensor, turn_mask_NT: Tensor, turns: Turns) -> Tensor:
    """Returns sums over a pair's turns, or each turn, 0 if absent. `[N, T] -> [N, U]`."""
    present_NT = torch.where(turn_mask_NT, values_NT, torch.zeros_like(values_NT))
    return present_NT.sum(dim=1, keepdim=True) if turns == "summed" else present_NT


def mean_over_units(losses_NU: Tensor, turn_mask_NT: Tensor, turns: Turns) -> Tensor:
    """Returns the mean over a pair's own units, 0 without any turn. `[N, U] -> [N]`."""
    num_units_N = _unit_mask(turn_mask_NT, turns).sum(dim=1)
    return sum_over_units(losses_NU, turn_mask_NT, turns) / num_units_N.clamp(min=1)


def sum_over_units(values_NU: Tensor, turn_mask_NT: Tensor, turns: Turns) -> Tensor:
    """Returns the sum over a pair's own units, 0 without any turn. `[N, U] -> [N]`."""
    mask_NU = _unit_mask(turn_mask_NT, turns)
    return torch.where(mask_NU, values_NU, torch.zeros_like(values_NU)).sum(dim=1)


def token_mean(
    logps_NT: Tensor, token_counts_NT: Tensor, turn_mask_NT: Tensor, turns: Turns
) -> Tensor:
    """Returns the mean log-prob of a token in each unit, 0 without tokens. `[N, T] -> [N, U]`.

    The mean is over all answer tokens of the conversation, or of each turn by itself.
    """
    logps_NU = per_unit(logps_NT, turn_mask_NT, turns)
    return logps_NU / per_unit(token_counts_NT, turn_mask_NT, turns).clamp(min=1)


def _unit_mask(turn_mask_NT: Tensor, turns: Turns) -> Tensor:
    return turn_mask_NT.any(dim=1, keepdim=True) if turns == "summed" else turn_mask_NT


def mean_over_tokens(sum_N: Tensor, count_N: Tensor) -> Tensor:
    """Returns sum_n / count_n, and 0 with zero gradient if the count is 0. `[N], [N] -> [N]`."""
    # The clamp keeps 0 / 0 out of the branch that `where` drops: its backward would be NaN.
    mean_N = sum_N / count_N.clamp(min=1)
    return torch.where(count_N > 0, mean_N, torch.zeros_like(mean_N))
