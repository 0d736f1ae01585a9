"""SFT and the NLL term: numbers by hand, and no NaN from a pair without tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_longpo.objectives import PairLogps
from megatron_longpo.objectives.turns import mean_over_tokens
from tests.objectives.logps import objective, pair_logps


def nll_only(nll_sum: list[float], nll_count: list[int]) -> PairLogps:
    """Pairs whose preference fields would poison any loss that read them."""
    poison = torch.full((len(nll_sum), 1), float("nan"))
    return pair_logps(
        torch.ones_like(poison, dtype=torch.bool),
        policy={"long_chosen": poison, "long_rejected": poison},
        nll=(torch.tensor(nll_sum, requires_grad=True), nll_count),
    )


def sft(name: str, **settings: Any) -> Any:
    return objective(name, **{"nll_weight": 1.0, **settings})


@pytest.mark.parametrize("name", ["sft", "sft_rejected"])
def test_loss_is_the_weighted_mean_over_the_pairs_tokens(name: str) -> None:
    # 6 / 3 = 2 and 10 / 4 = 2.5, both halved by the weight.
    logps = nll_only([6.0, 10.0], [3, 4])
    out = sft(name, nll_weight=0.5)(logps)
    assert out.loss_N.tolist() == [1.0, 1.25]
    assert out.metrics["nll_loss"].tolist() == [2.0, 2.5]
    assert not out.metrics["nll_loss"].requires_grad
    assert set(out.metrics) == {"nll_loss"}
    out.loss_N.sum().backward()
    # 0.5 / 3 and 0.5 / 4.
    torch.testing.assert_close(logps.nll_sum_N.grad, torch.tensor([1 / 6, 1 / 8]))


def test_a_pair_without_nll_tokens_adds_nothing() -> None:
    nll_sum_N = torch.tensor([0.0, 3.0], requires_grad=True)
    nll_N = mean_over_tokens(nll_sum_N, torch.tensor([0, 2]))
    nll_N.sum().backward()
    assert nll_N.tolist() == [0.0, 1.5]
    assert nll_sum_N.grad is not None and nll_sum_N.grad.tolist() == [0.0, 0.5]


def test_longpo_counts_no_nll_for_a_pair_without_tokens() -> None:
    zeros = torch.zeros(1, 1, requires_grad=True)
    logps = pair_logps(
        [[True]],
        policy={"long_chosen": zeros, "long_rejected": zeros},
        nll=(torch.zeros(1, requires_grad=True), [0]),
    )
    out = sft("longpo", beta=1.0, preference_weight=1.0)(logps)
    out.loss_N.sum().backward()
    torch.testing.assert_close(out.loss_N, torch.tensor([2.0]).log())
    assert out.metrics["nll_loss"].tolist() == [0.0]
    assert logps.nll_sum_N.grad is not None and logps.nll_sum_N.grad.tolist() == [0.0]
