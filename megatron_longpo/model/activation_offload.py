"""Keeps what backward needs of the policy's layers in CPU memory from forward to backward.

Copies run on their own streams, in parallel with the computation: to the host while later layers
run, and back while the layers above run backward. They use pinned blocks of one size, again and
again: the host's allocator would round every tensor up to a power of two.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BLOCK_BYTES = 64 * 2**20
"""Size of a block of host memory. A tensor wastes less than one block."""

SMALLEST_BYTES = 2**20
"""Smaller tensors stay on the device: those of a long row that need memory are larger."""

AHEAD = 2
"""Tensors that are being copied at a time, each way; they stay on the device that long."""


@dataclass(slots=True)
class _Block:
    """A block of host memory, and the last copy that used it."""

    memory: Tensor
    last_use: Any = None


@dataclass(slots=True, eq=False)
class Offloaded:
    """A tensor that is or will be in host memory; `ActivationOffload.fetch` brings it back.

    Its blocks are free again when nothing refers to it: autograd drops it after its backward.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    blocks: list[_Block]
    pool: list[_Block]
    before: Offloaded | None
    """The tensor that was put before it in the same pass: backward needs it next."""
    on_device: Tensor | None
    """Its elements (`_elements`) while they are on the device, before or after; else None."""
    is_home: Any = None
    """Event of the end of the last copy, in either direction."""

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
    """Moves what autograd saves inside `forward_pass`, and what is `put` there, to host memory.

    Weights stay on the device, and so do small tensors and those that `forward_pass` is told to
    keep. Without a GPU the same code runs with plain copies.
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
        """Moves tensors that are saved for backward inside to the host.

        The weights of `module` and the tensors of `keep` stay.
        """
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
        """Starts to copy a tensor to the host, if it is large enough and inside `forward_pass`.

        Returns what `fetch` takes.
        """
        size = math.prod(_once(tensor.shape, tensor.stride())) * tensor.element_size()
        passing = self._current
        if passing is None or tensor.device.type != self._device.type or size < SMALLEST_BYTES:
            return tensor
        elements = _elements(tensor.detach())
        taken = Offloaded(
            shape=tuple(tensor.shape),
            strides=tensor.stride(),
            dtype=tensor.dtype,
            blocks=[self._block() for _ in range(-(-size // BLOCK_BYTES))],
            pool=self._free,
            before=passing.last,
            on_device=elements,
        )
        passing.last = taken
        with self._stream(self._out):
            for block in taken.blocks:
                if block.last_use is not None:
                    block.last_use.wait()
            for host, device in _pieces(taken.blocks, elements):
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
        """Returns the tensor that was `put`, and starts to copy those before it to the device.

        Its strides are as before: with other ones some kernels sum in another order.
        """
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
        return _laid_out(saved.on_device, saved.shape, saved.strides)

    def _send_back(self, taken: Offloaded) -> None:
        if taken.on_device is not None:
            return
        # Made on the stream that computes, whose memory it is.
        count = math.prod(_once(taken.shape, taken.strides))
        elements = torch.empty(count, dtype=taken.dtype, device=self._device)
        with self._stream(self._back):
            for host, device in _pieces(taken.blocks, elements):
                device.copy_(host, non_blocking=True)
            taken.is_home = self._event()
        taken.on_device = elements

    def _block(self) -> _Block:
        if self._free:
            return self._free.pop()
        memory = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=self._has_streams)
        return _Block(memory)

    @contextmanager
    def _stream(self, stream: Any) -> Iterator[None]:
        """Queues work inside after all earlier work of the device, in parallel with later work."""
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            yield

    def _event(self) -> Any:
        return torch.cuda.current_stream().record_event() if self._has_streams else None


def _wait(event: Any) -> None:
    """Makes later work of the device wait for `event`; the host does not wait."""
    if event is not None:
        event.wait()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _once(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape without the dimensions that `expand` repeats."""
    return tuple(1 if step == 0 else size for size, step in zip(shape, strides, strict=True))


def _has_gaps(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements, in any order, do not fill one piece of memory."""
    count = 1
    for step, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and step != count:
            return True
        count *= size
    return False


def _elements(tensor: Tensor) -> Tensor:
    """Returns each element of a tensor once, [n]: in memory's order if there are no gaps."""
    shape, strides = _once(tensor.shape, tensor.stride()), tensor.stride()
    once = tensor.as_strided(shape, strides)
    if _has_gaps(shape, strides):
        return once.contiguous().view(-1)
    return once.as_strided((once.numel(),), (1,))


def _laid_out(elements: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Returns the tensor of this shape and strides whose `_elements` these are."""
    once = _once(shape, strides)
    if not _has_gaps(once, strides):
        return elements.as_strided(once, strides).expand(shape)
    tensor = elements.new_empty_strided(once, strides)
    return tensor.copy_(elements.view(once)).expand(shape)


def _pieces(blocks: list[_Block], elements: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields pieces of the blocks and of the elements, in pairs of the same number of bytes."""
    whole = elements.view(torch.uint8)
    for block, piece in zip(blocks, whole.split(BLOCK_BYTES), strict=True):
        yield block.memory[: len(piece)], piece
