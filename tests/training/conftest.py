from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from megatron_longpo.stop import STOP_SIGNALS


@pytest.fixture
def own_signal_handlers() -> Iterator[None]:
    """Training catches stop signals; the test process gets its own handlers back."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
