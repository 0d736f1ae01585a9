"""Runs one function over many items in several processes; results keep the items' order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from megatron_longpo.errors import UserError

_WAITING_PER_WORKER = 4
"""Calls handed out ahead of time: enough to keep workers busy while one result is late, few enough
that results do not fill the memory."""


def usable_cpus() -> int:
    """Returns the number of CPUs this process may use: in a job, often not the whole machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerPool:
    """Worker processes that each hold the function that `make_task` returns.

    They are forked from a server process that has no threads and has done their imports, not from
    this process. An error in the function is raised here unchanged, in the items' order. Ctrl-C
    ends this process, which ends the workers.
    """

    def __init__(
        self,
        make_task: Callable[[], Callable[[Any], Any]],
        *,
        num_workers: int,
        imports: Sequence[str] = (),
    ) -> None:
        """Starts no process yet. `make_task` is pickled; `imports` are modules slow to import."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(imports))
        self._num_workers = num_workers
        self._pool = ProcessPoolExecutor(
            num_workers, mp_context=context, initializer=_start, initargs=(make_task,)
        )

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, items: Sequence[Any], *, chunk_size: int = 1) -> Iterator[Any]:
        """Yields the function's result for each item, in order."""
        chunks = (items[at : at + chunk_size] for at in range(0, len(items), chunk_size))
        waiting: deque[Future[list[Any]]] = deque()
        try:
            for chunk in chunks:
                with _interrupts_held():  # the first calls start processes
                    waiting.append(self._pool.submit(_run, chunk))
                if len(waiting) == _WAITING_PER_WORKER * self._num_workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                f"num_workers ({self._num_workers}): a worker process has died, most likely "
                "because memory ran out; give fewer workers"
            ) from None


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Blocks SIGINT while processes start: a terminal sends it to all, and only ours may react."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_task: Callable[[Any], Any] | None = None
"""The function of this worker process."""


def _start(make_task: Callable[[], Callable[[Any], Any]]) -> None:
    global _task
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # One process for each CPU, each with tokenizers' own threads, would compete for the CPUs.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _task = make_task()


def _end_with_parent() -> None:
    """Ends this worker when its parent has ended, even if the parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(items: Sequence[Any]) -> list[Any]:
    assert _task is not None
    return [_task(item) for item in items]
