"""Answers Megatron-Core's CUDA calls on a machine that has no GPU.

Megatron's code names its device: `device="cuda"`, `.cuda()`, `tensor.type() ==
"torch.cuda.FloatTensor"`, `torch.cuda.current_device()`. `install` makes all of these mean the CPU,
so that CPUs and GPUs run the same code. It does nothing where CUDA is available.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_active_mode: CudaMeansCpu | None = None


class CudaMeansCpu(TorchFunctionMode):
    """Turns requests for CUDA tensors into ones for CPU tensors, in the thread that entered it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Optimizers sort parameters by type name and know only the CUDA ones.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to:
            args = tuple(CPU if _names_cuda(argument) else argument for argument in args)
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


def install() -> None:
    """Makes CUDA mean CPU in this process, if there is no CUDA. A second call does nothing."""
    global _active_mode
    if torch.cuda.is_available() or _active_mode is not None:
        return
    _answer_cuda_functions()
    _active_mode = CudaMeansCpu()
    _active_mode.__enter__()


def _answer_cuda_functions() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.set_device = nothing
    cuda.synchronize = nothing
    cuda.current_stream = _NoStream
    cuda.default_stream = _NoStream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.get_rng_state = get_rng_state
    cuda.set_rng_state = set_rng_state
    cuda.manual_seed = torch.manual_seed
    # The originals only queue their work until CUDA starts, which it never does.
    megatron_random._get_cuda_rng_state = get_rng_state
    megatron_random._set_cuda_rng_state = set_rng_state


class _NoStream:
    """A stream whose work is always done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"
