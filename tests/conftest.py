from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from megatron_longpo.parallel.groups import Groups
from megatron_longpo.runtime.stop import STOP_SIGNALS

if TYPE_CHECKING:
    from tests.parity.harness import Shelf


# For tensors as small as the tests' a second thread only costs, most of all on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def single_process() -> Iterator[Groups]:
    """Megatron's process groups for a world of one, shared by all tests of the session."""
    from megatron_longpo.parallel import groups

    yield groups.initialize(groups.ParallelSizes())
    groups.shutdown()


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Tiny models and rows for `tests.parity.cases`, made once a session."""
    from tests.parity.harness import Shelf

    return Shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture
def own_signal_handlers() -> Iterator[None]:
    """Training catches stop signals; the test process gets its own handlers back."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
