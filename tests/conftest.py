from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_longpo.parallel.groups import Groups


@pytest.fixture(scope="session")
def single_process() -> Iterator[Groups]:
    """Megatron's process groups for a world of one, shared by all tests of the session."""
    from megatron_longpo.parallel import groups

    yield groups.initialize(groups.ParallelSizes())
    groups.shutdown()
