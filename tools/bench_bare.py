"""The limit of a step: its attention calls and matrix products alone, by the fastest kernels here.

Nothing is recomputed, normalised, added or communicated, and backward is given what it needs. A
time is either the best of a few single calls (`fastest`), or the mean of a row of them
(`sustained`): a GPU that computes for long meets its power limit and lowers its clock, as it does
in training, while a single call runs at the full clock.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import Architecture
from megatron_longpo.model.kernel_choice import choose_kernel
from megatron_longpo.model.kernels import AttentionKernel
from megatron_longpo.parallel.layout import AttentionPlan, RankPack

KERNELS = ("te", "cudnn", "flash_attn", "sdpa")
REPEATS = 3
LARGEST_PRODUCT = 32768
"""Rows of a product that are timed; more take as much longer, and would only need memory."""

SUSTAINED_SECONDS = 0.25

Block = tuple[int, int, bool]
"""Queries, keys, whether causal."""
Timer = Callable[[Callable[[], object]], float]
"""Seconds of a call."""


def fastest(call: Callable[[], object], *, repeats: int = REPEATS) -> float:
    """The best time of a call, after one that is not counted; 0 where that one is all."""
    call()
    times = []
    _wait()
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        _wait()
        times.append(time.perf_counter() - started)
    return min(times, default=0.0)


def sustained(call: Callable[[], object]) -> float:
    """The mean time of a call in a row without a pause, behind another such row."""
    call()
    seconds = _row_seconds(call, 1)
    for _ in range(2):
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


def bare_seconds(
    pack: RankPack,
    policy: Architecture,
    reference: Architecture | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    tensor: int = 1,
    pipeline: int = 1,
    attention_ranks: int = 1,
    timer: Timer = fastest,
) -> dict[str, float]:
    """Seconds by part of one microbatch on one rank; the reference's passes are forward only.

    `attention_ranks` share the heads out: more than `tensor` where context parallelism does so too.
    Under pipeline parallelism the head is spread evenly over the stages.
    """
    kernels = available_kernels(policy.head_dim, device=device, dtype=dtype)

    def model_parts(
        arch: Architecture, num_tokens: int, plan: AttentionPlan, num_edges: int, backward: bool
    ) -> dict[str, float]:
        def product(tokens: int, width_in: int, width_out: int) -> float:
            return bare_matmul(
                tokens,
                width_in,
                width_out,
                device=device,
                dtype=dtype,
                backward=backward,
                timer=timer,
            )

        layers = arch.num_layers / pipeline
        linears = sum(product(num_tokens, *shape) for shape in linear_shapes(arch, tensor))
        head = product(num_edges, arch.hidden_size, -(-arch.vocab_size // tensor))
        attention = min(
            bare_attention(
                kernel,
                plan,
                arch,
                ranks=attention_ranks,
                device=device,
                dtype=dtype,
                backward=backward,
                timer=timer,
            )
            for kernel in kernels.values()
        )
        return {
            "attention": layers * attention,
            "linears": layers * linears,
            "head": head / pipeline,
        }

    parts = model_parts(
        policy, pack.policy.num_tokens, pack.policy.attention, len(pack.policy.edges.sources), True
    )
    if pack.reference is not None:
        assert reference is not None
        short = pack.reference
        forward = model_parts(
            reference, short.num_tokens, short.attention, len(short.edges.sources), False
        )
        parts["reference"] = sum(forward.values())
    return parts


def available_kernels(
    head_dim: int, *, device: torch.device, dtype: torch.dtype
) -> dict[str, AttentionKernel]:
    """Every kernel that runs here, by its setting."""
    kernels = {}
    for setting in KERNELS:
        try:
            chosen = choose_kernel(setting, device=device, dtype=dtype, head_dim=head_dim)
        except UserError:
            continue
        kernels[chosen.setting] = chosen.kernel
    return kernels


def blocks_of(plan: AttentionPlan) -> Counter[Block]:
    """The kernel calls of a layer, each with how often it is made."""
    blocks: Counter[Block] = Counter()
    for piece in plan.pieces:
        blocks[len(piece.queries), len(piece.own_keys), True] += 1
        for keys in piece.context:
            blocks[len(piece.queries), len(keys), False] += 1
    return blocks


def bare_attention(
    kernel: AttentionKernel,
    plan: AttentionPlan,
    arch: Architecture,
    *,
    ranks: int,
    device: torch.device,
    dtype: torch.dtype,
    backward: bool,
    timer: Timer = fastest,
) -> float:
    """Seconds of a layer's attention calls on one of the ranks that share its heads."""
    seconds = 0.0
    for block, count in blocks_of(plan).items():
        forward, both = attention_seconds(
            kernel,
            block,
            num_heads=arch.num_heads // ranks,
            num_kv_heads=max(1, arch.num_kv_heads // ranks),
            head_dim=arch.head_dim,
            device=device,
            dtype=dtype,
            timer=timer,
        )
        seconds += count * (both if backward else forward)
    return seconds


def attention_seconds(
    kernel: AttentionKernel,
    block: Block,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    timer: Timer = fastest,
) -> tuple[float, float]:
    """Seconds of one block, forward, and forward and backward."""
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

    def forward() -> tuple[Tensor, Tensor]:
        return kernel.forward(query, key, value, causal=causal, scale=scale)

    output, logsumexp = forward()

    def backward() -> object:
        return kernel.backward(
            grad, query, key, value, output, logsumexp, causal=causal, scale=scale
        )

    forward_seconds = timer(forward)
    return forward_seconds, forward_seconds + timer(backward)


def linear_shapes(arch: Architecture, tensor: int = 1) -> Iterable[tuple[int, int]]:
    """(in, out) of one layer's matrices on one tensor-parallel rank."""
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
    """Seconds of a linear layer's product, and of those of input and weight gradient."""
    if tokens > LARGEST_PRODUCT:
        part = bare_matmul(
            LARGEST_PRODUCT,
            width_in,
            width_out,
            device=device,
            dtype=dtype,
            backward=backward,
            timer=timer,
        )
        return part * tokens / LARGEST_PRODUCT
    if not tokens:
        return 0.0
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
