"""The operators that torch runs, seen one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
"""Operators whose result depends on values in a way that the CPU must know of."""

VIEWS = (
    "slice",
    "alias",
    "view",
    "t",
    "numpy_T",
    "permute",
    "unsqueeze",
    "squeeze",
    "transpose",
    "unbind",
)
"""Operators that launch nothing on a GPU."""


class Operators(TorchDispatchMode):
    """Lists what runs inside, by name without overload."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.waits: list[str] = []
        """Those for which a CPU would have to wait for its GPU."""

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = operator.name().removeprefix("aten::").split(".")[0]
        self.names.append(name)
        # An index of booleans is first turned into numbers, as many as there are.
        picks = name.startswith(("index", "_index", "_unsafe_index")) and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for argument in args
            if isinstance(argument, (list, tuple))
            for index in argument
        )
        if picks or name in READS:
            self.waits.append(name)
        return operator(*args, **(kwargs or {}))

    @property
    def launched(self) -> list[str]:
        """Without views."""
        return [name for name in self.names if name not in VIEWS]
