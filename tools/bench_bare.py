"""The limit of a step: its attention calls and matrix products alone, by the fastest kernels here.

Nothing is recomputed, normalised, added or communicated, and backward is given what it needs. A
time is either the best of a few single calls (`fastest`), or the mean of a series of them
(`sustained`): a GPU that computes for long meets its power limit and lowers its clock, as it does
in training, while a single call runs at the full clock.

Timing a shape takes a few seconds at most, however long the row: similar shapes are timed once, at
a slightly shorter length, and lengths above a largest one are extrapolated in proportion. A kernel
that is far behind on a small block is not tried on the large one.
"""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable

import torch

from megatron_longpo.config.names import AttentionKernel as KernelName
from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import Architecture
from megatron_longpo.model.attention.blocks import Attended, one_block
from megatron_longpo.model.attention.kernel_choice import choose_kernel
from megatron_longpo.model.attention.kernels import AttentionKernel
from megatron_longpo.parallel.attention_plan import AttentionPlan
from megatron_longpo.parallel.layout import RankPack

KERNELS: tuple[KernelName, ...] = ("fa4", "te", "cudnn", "flash_attn", "sdpa")
REPEATS = 3
LARGEST_PRODUCT = 32 * 1024
"""Rows of a product that are timed; more take as much longer, and would only need memory."""
LARGEST_BLOCK = 128 * 1024
"""Queries or keys of a block that are timed; more take as much longer as they have pairs."""
STEPS = 32
"""Lengths between one and its double that are timed."""
SCREENED_BLOCK = 16 * 1024
FAR_BEHIND = 1.2
"""A kernel that takes this many times the fastest's time of a small block loses the large one."""

SUSTAINED_SECONDS = 0.25
COUNTED_SECONDS = 0.5
"""Enough calls have been counted after this."""

BlockShape = tuple[int, int, bool]
"""Queries, keys, whether causal."""
Timer = Callable[[Callable[[], object]], float]
"""Seconds of a call."""


def fastest(call: Callable[[], object], *, repeats: int = REPEATS) -> float:
    """Returns the best time of a call, after one that is not counted; 0 without `repeats`."""
    call()
    times: list[float] = []
    _wait()
    while len(times) < repeats and sum(times) < COUNTED_SECONDS:
        started = time.perf_counter()
        call()
        _wait()
        times.append(time.perf_counter() - started)
    return min(times, default=0.0)


def sustained(call: Callable[[], object]) -> float:
    """Returns the mean time of a call in a series without a pause, after another such series.

    A call that is as long as a series is a series.
    """
    call()
    seconds = _row_seconds(call, 1)
    for _ in range(2):
        if seconds >= SUSTAINED_SECONDS:
            break
        count = math.ceil(SUSTAINED_SECONDS / seconds)
        seconds = _row_seconds(call, count) / count
    return seconds


def _row_seconds(call: Callable[[], object], count: int) -> float:
    _wait()
    started = time.perf_counter()
    for _ in range(count):
        call()
    _wait()
    return time.perf_counter() - started


class Limit:
    """Bare seconds of microbatches on one rank; each shape is timed once.

    `tensor * context_inner` ranks share the heads out. Under pipeline parallelism the head is
    spread evenly over the stages.
    """

    def __init__(
        self,
        *,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        tensor: int = 1,
        pipeline: int = 1,
        context_inner: int = 1,
    ) -> None:
        self.kernels = available_kernels(head_dim, device=device, dtype=dtype)
        self._head_dim = head_dim
        self._device, self._dtype = device, dtype
        self._tensor, self._pipeline = tensor, pipeline
        self._attention_ranks = tensor * context_inner
        self._fastest_kernel = functools.cache(self._find_fastest_kernel)
        self._block_seconds = functools.cache(self._time_block)
        self._product_seconds = functools.cache(self._time_product)

    def seconds(
        self,
        pack: RankPack,
        policy: Architecture,
        reference: Architecture | None,
        *,
        timer: Timer = fastest,
    ) -> dict[str, float]:
        """Returns seconds of one microbatch by part; the reference's passes are forward only."""
        long = pack.policy
        parts = self._model_parts(
            policy, long.num_tokens, long.attention, len(long.edges.sources), True, timer
        )
        if pack.reference is not None:
            assert reference is not None
            short = pack.reference
            forward = self._model_parts(
                reference, short.num_tokens, short.attention, len(short.edges.sources), False, timer
            )
            parts["reference"] = sum(forward.values())
        return parts

    def _model_parts(
        self,
        arch: Architecture,
        num_tokens: int,
        plan: AttentionPlan,
        num_edges: int,
        backward: bool,
        timer: Timer,
    ) -> dict[str, float]:
        heads = arch.num_heads // self._attention_ranks
        kv_heads = max(1, arch.num_kv_heads // self._attention_ranks)
        attention = sum(
            count * self.block_seconds(block, heads, kv_heads, backward=backward, timer=timer)
            for block, count in blocks_of(plan).items()
        )
        linears = sum(
            self.product_seconds(num_tokens, *shape, backward=backward, timer=timer)
            for shape in linear_shapes(arch, self._tensor)
        )
        width = -(-arch.vocab_size // self._tensor)
        head = self.product_seconds(
            num_edges, arch.hidden_size, width, backward=backward, timer=timer
        )
        layers = arch.num_layers / self._pipeline
        return {
            "attention": layers * attention,
            "linears": layers * linears,
            "head": head / self._pipeline,
        }

    def block_seconds(
        self, block: BlockShape, num_heads: int, num_kv_heads: int, *, backward: bool, timer: Timer
    ) -> float:
        """Returns the seconds of the kernel that is the fastest for this block."""
        queries, keys, causal = block
        timed = (_timed_length(queries, LARGEST_BLOCK), _timed_length(keys, LARGEST_BLOCK), causal)
        seconds = self._block_seconds(timed, num_heads, num_kv_heads, backward, timer)
        return seconds * num_attended(block) / num_attended(timed)

    def _time_block(
        self, block: BlockShape, num_heads: int, num_kv_heads: int, backward: bool, timer: Timer
    ) -> float:
        kernel = self.kernels[self._fastest_kernel(block, num_heads, num_kv_heads)]
        return self._seconds_of(kernel, block, num_heads, num_kv_heads, backward, timer)

    def _find_fastest_kernel(self, block: BlockShape, num_heads: int, num_kv_heads: int) -> str:
        queries, keys, causal = block
        small = (min(queries, SCREENED_BLOCK), min(keys, SCREENED_BLOCK), causal)
        names = list(self.kernels)
        for tried in (small, block):
            if len(names) == 1:
                break
            seconds = {
                name: self._seconds_of(
                    self.kernels[name], tried, num_heads, num_kv_heads, True, _once
                )
                for name in names
            }
            names.sort(key=seconds.__getitem__)
            if tried == block:
                break
            names = [name for name in names if seconds[name] < FAR_BEHIND * seconds[names[0]]]
        return names[0]

    def _seconds_of(
        self,
        kernel: AttentionKernel,
        block: BlockShape,
        num_heads: int,
        num_kv_heads: int,
        backward: bool,
        timer: Timer,
    ) -> float:
        forward, both = attention_seconds(
            kernel,
            block,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=self._head_dim,
            device=self._device,
            dtype=self._dtype,
            backward=backward,
            timer=timer,
        )
        return both if backward else forward

    def product_seconds(
        self, tokens: int, width_in: int, width_out: int, *, backward: bool, timer: Timer
    ) -> float:
        """Returns the seconds of a linear layer's product, with `backward` its gradients' too."""
        if not tokens:
            return 0.0
        timed = _timed_length(tokens, LARGEST_PRODUCT)
        seconds = self._product_seconds(timed, width_in, width_out, backward, timer)
        return seconds * tokens / timed

    def _time_product(
        self, tokens: int, width_in: int, width_out: int, backward: bool, timer: Timer
    ) -> float:
        return bare_matmul(
            tokens,
            width_in,
            width_out,
            device=self._device,
            dtype=self._dtype,
            backward=backward,
            timer=timer,
        )


def _once(call: Callable[[], object]) -> float:
    return fastest(call, repeats=1)


def _timed_length(length: int, largest: int) -> int:
    """Rounds down to a multiple of a power of two, by a `STEPS`-th at most, or to `largest`."""
    step = 1 << max(0, (length // STEPS).bit_length() - 1)
    return min(largest, length - length % step)


def num_attended(block: BlockShape) -> float:
    """Returns the number of pairs of a query and a key that it attends."""
    queries, keys, causal = block
    return queries * (queries + 1) / 2 if causal else queries * keys


def available_kernels(
    head_dim: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    names: Iterable[KernelName] = KERNELS,
) -> dict[str, AttentionKernel]:
    """Returns those of the named kernels that run here, by name."""
    kernels: dict[str, AttentionKernel] = {}
    for name in names:
        try:
            chosen = choose_kernel(name, device=device, dtype=dtype, head_dim=head_dim)
        except UserError:
            continue
        kernels[chosen.setting] = chosen.kernel
    return kernels


def blocks_of(plan: AttentionPlan) -> Counter[BlockShape]:
    """Returns the kernel calls of a layer, each with how often it is made."""
    blocks: Counter[BlockShape] = Counter()
    for piece in plan.pieces:
        blocks[len(piece.queries), len(piece.own_keys), True] += 1
        for keys in piece.context:
            blocks[len(piece.queries), len(keys), False] += 1
    return blocks


def attention_seconds(
    kernel: AttentionKernel,
    block: BlockShape,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    backward: bool = True,
    timer: Timer = fastest,
) -> tuple[float, float]:
    """Returns the seconds of one block: of forward, and of forward and, if `backward`, backward."""
    queries, keys, causal = block
    query, key, value, grad = (
        torch.randn(length, heads, head_dim, device=device, dtype=dtype)
        for length, heads in (
            (queries, num_heads),
            (keys, num_kv_heads),
            (keys, num_kv_heads),
            (queries, num_heads),
        )
    )
    scale = head_dim**-0.5

    attention = one_block(query, key, value, causal=causal, scale=scale)

    def forward() -> Attended:
        return kernel.forward(attention)

    forward_seconds = timer(forward)
    if not backward:
        return forward_seconds, forward_seconds
    attended = forward()

    def run_backward() -> object:
        return kernel.backward(attention, attended, grad)

    return forward_seconds, forward_seconds + timer(run_backward)


def linear_shapes(arch: Architecture, tensor: int = 1) -> Iterable[tuple[int, int]]:
    """Returns (in, out) of one layer's matrices on one tensor-parallel rank."""
    width = arch.num_heads * arch.head_dim // tensor
    kv_width = max(1, arch.num_kv_heads // tensor) * arch.head_dim
    ffn = arch.ffn_hidden_size // tensor
    return (
        (arch.hidden_size, width + 2 * kv_width),
        (width, arch.hidden_size),
        (arch.hidden_size, 2 * ffn),
        (ffn, arch.hidden_size),
    )


def bare_matmul(
    tokens: int,
    width_in: int,
    width_out: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    backward: bool = True,
    timer: Timer = fastest,
) -> float:
    """Returns the seconds of a linear layer's product; with `backward` also of its gradients."""
    states = torch.randn(tokens, width_in, device=device, dtype=dtype)
    weight = torch.randn(width_out, width_in, device=device, dtype=dtype)
    forward = timer(lambda: states @ weight.T)
    if not backward:
        return forward
    gradient = torch.randn(tokens, width_out, device=device, dtype=dtype)
    return forward + timer(lambda: gradient @ weight) + timer(lambda: gradient.T @ states)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
