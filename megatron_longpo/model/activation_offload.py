"""What backward needs of the policy's layers, in CPU memory from forward until then.

Copies run on streams of their own, beside the computation: out while later layers run, and back
while the layers above run backward. They go through pinned blocks of one size, which are used again
and again: the host's allocator would round every tensor up to a power of two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BLOCK_BYTES = 64 * 2**20
"""Of a piece of host memory; a tensor wastes less than one."""

SMALLEST_BYTES = 2**20
"""Tensors below this stay: of a long row they are none of those that matter."""

AHEAD = 2
"""Tensors that are on their way out, and back, at a time; they are on the device for that long."""


@dataclass(slots=True)
class _Block:
    """Host memory, and the copy that was the last to use it."""

    memory: Tensor
    last_use: Any = None


@dataclass(slots=True, eq=False)
class Offloaded:
    """A tensor that has left the device, or is about to; `ActivationOffload.fetch` returns it.

    Its blocks are free again when nobody holds it: autograd lets go of it after its backward.
    """

    shape: torch.Size
    dtype: torch.dtype
    blocks: list[_Block]
    pool: list[_Block]
    before: Offloaded | None
    """The one that left before it in the same pass: backward wants it next."""
    on_device: Tensor | None
    """It, or its copy that came back, as long as there is one."""
    is_home: Any = None
    """When the copy that is under way, out or back, is done."""

    def __del__(self) -> None:
        for block in self.blocks:
            block.last_use = self.is_home
        self.pool.extend(self.blocks)


@dataclass(slots=True)
class _Pass:
    """One forward pass through a chunk's layers."""

    last: Offloaded | None = None
    leaving: deque[Offloaded] = field(default_factory=deque)


class ActivationOffload:
    """Takes what autograd saves inside `forward_pass`, and what is `put` there, off the device.

    Weights stay, and so do small tensors and those that `forward_pass` is told to keep. Without a
    GPU the copies are plain ones, so that the same code runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._has_streams = device.type == "cuda"
        self._out = torch.cuda.Stream(device) if self._has_streams else None
        self._back = torch.cuda.Stream(device) if self._has_streams else None
        self._free: list[_Block] = []
        self._current: _Pass | None = None

    @contextmanager
    def forward_pass(self, module: nn.Module, keep: Iterable[Tensor] = ()) -> Iterator[None]:
        """Inside, tensors that are saved for backward leave, but for `module`'s weights."""
        staying = {_storage(tensor) for tensor in (*module.parameters(), *keep)}
        self._current = _Pass()

        def pack(tensor: Tensor) -> Tensor | Offloaded:
            return tensor if _storage(tensor) in staying else self.put(tensor)

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, self.fetch):
                yield
        finally:
            self._current = None

    def put(self, tensor: Tensor) -> Tensor | Offloaded:
        """Sends a tensor on its way, where it is large enough, inside of `forward_pass`."""
        size = tensor.numel() * tensor.element_size()
        passing = self._current
        if passing is None or tensor.device.type != self._device.type or size < SMALLEST_BYTES:
            return tensor
        source = tensor.detach().contiguous()
        taken = Offloaded(
            shape=tensor.shape,
            dtype=tensor.dtype,
            blocks=[self._block() for _ in range(-(-size // BLOCK_BYTES))],
            pool=self._free,
            before=passing.last,
            on_device=source,
        )
        passing.last = taken
        with self._stream(self._out):
            for block in taken.blocks:
                if block.last_use is not None:
                    block.last_use.wait()
            for host, device in _pieces(taken.blocks, source):
                host.copy_(device, non_blocking=True)
            taken.is_home = self._event()
        passing.leaving.append(taken)
        if len(passing.leaving) > AHEAD:
            # From here on later kernels may have its memory. The host runs ahead of the device:
            # it is the stream that waits, by now for a copy that began several layers ago.
            gone = passing.leaving.popleft()
            _wait(gone.is_home)
            gone.on_device = None
        return taken

    def fetch(self, saved: Tensor | Offloaded) -> Tensor:
        """The tensor that was `put`, on the device; those before it set out on their way back."""
        if isinstance(saved, Tensor):
            return saved
        ahead: Offloaded | None = saved
        for _ in range(AHEAD + 1):
            if ahead is None:
                break
            self._send_back(ahead)
            ahead = ahead.before
        assert saved.on_device is not None, "it was sent back"
        _wait(saved.is_home)
        return saved.on_device

    def _send_back(self, taken: Offloaded) -> None:
        if taken.on_device is not None:
            return
        # Made on the stream that computes, whose memory it is.
        tensor = torch.empty(taken.shape, dtype=taken.dtype, device=self._device)
        with self._stream(self._back):
            for host, device in _pieces(taken.blocks, tensor):
                device.copy_(host, non_blocking=True)
            taken.is_home = self._event()
        taken.on_device = tensor

    def _block(self) -> _Block:
        if self._free:
            return self._free.pop()
        memory = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=self._has_streams)
        return _Block(memory)

    @contextmanager
    def _stream(self, stream: Any) -> Iterator[None]:
        """Work inside comes after what the device was given so far, and beside what follows."""
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            yield

    def _event(self) -> Any:
        return torch.cuda.current_stream().record_event() if self._has_streams else None


def _wait(event: Any) -> None:
    """What the device is given from now on waits for `event`; the host does not."""
    if event is not None:
        event.wait()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _pieces(blocks: list[_Block], tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of equally many bytes: of the blocks, and of a contiguous tensor."""
    whole = tensor.view(-1).view(torch.uint8)
    for block, piece in zip(blocks, whole.split(BLOCK_BYTES), strict=True):
        yield block.memory[: len(piece)], piece
