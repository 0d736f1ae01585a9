"""Writes checkpoints while training continues, through Megatron's queue of async calls.

Megatron copies tensors from the GPU to the host and forks a process that writes them. The process
sees the memory of that moment; later steps do not change it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest

from megatron_longpo.runtime import stop

ASYNC_SAVE: dict[str, Any] = {"async_sharded_save": True}
"""Arguments that make `dist_checkpointing.save` return a request to write later."""
if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
    # 0.19 would rather have nvidia-resiliency-ext, which CPUs do without.
    ASYNC_SAVE["async_strategy"] = "mcore"


class BackgroundSaves:
    """Runs one save at a time. All ranks must call every method except `abandon`."""

    def __init__(self) -> None:
        self._queue = AsyncCallsQueue()
        # The writing process reads the same pinned memory: it must not be handed out again.
        self._staged: Any = None

    def start(self, request: AsyncRequest, publish: Callable[[], None]) -> None:
        """Starts writing; `publish` runs on every rank when all of them have written."""
        assert not self._queue.get_num_unfinalized_calls(), "the save before is still written"

        def stage() -> Any:
            self._staged = request.preload_fn()
            return self._staged

        request.add_finalize_fn(publish)
        with stop.spare_children():
            self._queue.schedule_async_request(
                request._replace(preload_fn=stage if request.preload_fn else None)
            )

    def poll(self) -> None:
        """Publishes a save if all ranks have written it; returns at once otherwise."""
        self._finalize(is_blocking=False)

    def wait(self) -> None:
        """Waits for the save that is being written, if any, and publishes it."""
        self._finalize(is_blocking=True)

    def abandon(self) -> None:
        """Ends this rank's writing; its save is not published."""
        for call in self._queue.async_calls:
            call.async_caller.close(abort=True)
        self._queue.async_calls.clear()
        self._staged = None

    def _finalize(self, *, is_blocking: bool) -> None:
        if self._queue.maybe_finalize_async_calls(blocking=is_blocking):
            self._staged = None
