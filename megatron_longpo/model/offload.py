"""Weights of a frozen module that are kept in CPU memory, and on the device only during use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class OffloadedWeights:
    """Moves a frozen module's parameters to CPU memory and copies them to the device for each use.

    With a GPU the CPU's copy is pinned, so that copying runs at the full speed of the bus and in
    the stream's order. Without a GPU both copies are the same memory.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        # A weight that the embedding and the head share is one parameter, and stays one.
        self._kept: dict[nn.Parameter, Tensor] = {}
        for parameter in module.parameters():
            assert not parameter.requires_grad, "a weight that trains cannot leave its device"
            kept = parameter.data.to("cpu")
            self._kept[parameter] = kept.pin_memory() if device.type == "cuda" else kept
            parameter.data = self._kept[parameter]

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Keeps the parameters on the device inside, and frees their memory there on leaving.

        A backward that needs one of them must save its own tensor (`detach`), not the parameter,
        which by then is on the CPU again.
        """
        try:
            for parameter, kept in self._kept.items():
                parameter.data = kept.to(self._device, non_blocking=True)
            yield
        finally:
            for parameter, kept in self._kept.items():
                parameter.data = kept
