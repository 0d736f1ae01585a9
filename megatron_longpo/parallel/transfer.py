"""Copies of host arrays to the device that nothing waits for."""

from __future__ import annotations

import numpy as np
import torch


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies an array to `device` without waiting: the GPU takes its work in order."""
    return torch.from_numpy(array).to(device, non_blocking=True)
