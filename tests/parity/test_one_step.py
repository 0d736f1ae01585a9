"""One optimizer step of every kind of case equals plain transformers + torch."""

from __future__ import annotations

import pytest

from megatron_longpo.parallel.groups import Groups
from tests.parity.cases import CASES, Case
from tests.parity.harness import Shelf, compare, oracle_for, run_case, train_config


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_is_the_oracles(case: Case, shelf: Shelf, single_process: Groups) -> None:
    beta = train_config(case, shelf).objective.beta
    assert beta is not None
    compare(run_case(case, shelf, single_process), oracle_for(case, shelf), beta=beta)
