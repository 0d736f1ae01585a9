"""One step of the decoding loop as a CUDA graph, so that small models do not wait for kernel
launches."""

from __future__ import annotations

import sys
from typing import Any

import torch

from megatron_longpo.generation.backends.slots import SlotCache

GRAPHS = 8
"""Most lengths that graphs are captured for; a step attends the next longer one."""

LEAST_LENGTH = 1024


class GraphedSteps:
    """Captures `SlotCache.step` the first time that a length is asked for, then replays it.

    A model that cannot be captured is run without graphs, after a warning.
    """

    def __init__(self, model: Any, slots: SlotCache) -> None:
        self._model = model
        self._slots = slots
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool: Any = None
        self._works = True

    def step(self, length: int) -> torch.Tensor:
        """Returns logits [N, V], which the next step overwrites."""
        capacity = self._slots.shape.capacity
        unit = max(LEAST_LENGTH, -(-capacity // GRAPHS))
        length = min(-(-length // unit) * unit, capacity)
        if self._works and length not in self._graphs:
            with torch.cuda.device(self._model.device):  # a thread begins with the first GPU
                self._capture(length)
        if not self._works:
            return self._slots.step(self._model, length)
        graph, logits_NV = self._graphs[length]
        with torch.cuda.device(self._model.device):
            graph.replay()
        return logits_NV

    @torch.inference_mode()
    def _capture(self, length: int) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the libraries' workspaces, before they are captured
            self._slots.step(self._model, length)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits_NV = self._slots.step(self._model, length)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # such as a layer that waits for the GPU
            self._works = False
            reason = " ".join(str(error).split())[:200]
            print(f"warning: writes without CUDA graphs: {reason}", file=sys.stderr)
            return
        self._pool = self._pool or graph.pool()
        self._graphs[length] = graph, logits_NV
