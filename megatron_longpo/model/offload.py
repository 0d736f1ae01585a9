"""Weights of a frozen module that live in CPU memory and visit the device to be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class OffloadedWeights:
    """Takes a frozen module's parameters off the device, where they return for each use.

    On a GPU the CPU's copy is pinned, so that bringing it over runs at the full speed of the bus
    and in the stream's order. Without one both copies are the same memory.
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
        """The parameters are on the device inside, and its memory is free again outside.

        A backward that needs one of them must save a tensor of its own (`detach`), not the
        parameter, which by then is on the CPU again.
        """
        try:
            for parameter, kept in self._kept.items():
                parameter.data = kept.to(self._device, non_blocking=True)
            yield
        finally:
            for parameter, kept in self._kept.items():
                parameter.data = kept
