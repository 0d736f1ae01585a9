"""Which attention kernel runs: the one that the config names, or the fastest of this machine.

A kernel is taken only after a trial: a small causal block, a rectangle and two blocks at once,
forward and backward, against plain matrix products. A package that is installed and does not fit
the driver, the GPU or torch is thus named before training, and never trained with. The kernel of
long_blocks.py, which picks one of two for each block, is taken if both pass.

To add a kernel: write its file, add its name to `AttentionKernel` in config/names.py and its
`_Candidate` here, and put it into `_preferred` where `auto` shall try it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_longpo.config.names import AttentionKernel as KernelName
from megatron_longpo.errors import UserError
from megatron_longpo.model.attention.blocks import Block, causal_blocks, one_block
from megatron_longpo.model.attention.fa4_kernel import FlashAttention4Kernel
from megatron_longpo.model.attention.gpu_kernels import CudnnKernel, FlashAttnKernel, FlashKernel
from megatron_longpo.model.attention.kernels import AttentionKernel, CpuFlashKernel, MathKernel
from megatron_longpo.model.attention.long_blocks import SHORTEST_LONG_BLOCK, LongBlockKernel
from megatron_longpo.model.attention.te_kernel import TransformerEngineKernel

HOPPER = (9, 0)
"""Compute capability from which cuDNN's attention is the faster one."""

TRIAL_LENGTHS = ((192, 192, True), (160, 256, False), (2048, 2048, True))
"""Blocks of the trial: (queries, keys, causal). `CudnnKernel` leaves smaller ones to another, and
`FlashAttention4Kernel` calls the last in another way."""
TRIAL_BLOCKS = (130, 192)
"""Lengths of the trial's causal blocks that are one call."""
TRIAL_TOLERANCE = 2e-2
"""Largest relative error of a kernel that passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What a kernel will run on."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelChoice:
    """The kernel that runs."""

    setting: KernelName
    """The value of `model.attention_kernel` that would force it."""
    kernel: AttentionKernel
    line: str
    """What the start of a run prints about it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    """A kernel that may run on a GPU."""

    title: str
    make: Callable[[], AttentionKernel]
    largest_head: int
    """Size of the largest head that it has a backward for."""
    package: str | None = None
    """The package that it needs beside torch."""
    extra: str = "gpu"
    """The extra of setup.py that has the package."""


_CANDIDATES: dict[KernelName, _Candidate] = {
    "fa4": _Candidate(
        title="FlashAttention 4",
        make=FlashAttention4Kernel,
        largest_head=256,
        package="flash_attn.cute",
        extra="fa4",
    ),
    "te": _Candidate(
        title="cuDNN through Transformer Engine",
        make=TransformerEngineKernel,
        largest_head=128,
        package="transformer_engine",
    ),
    "cudnn": _Candidate(title="cuDNN through torch", make=CudnnKernel, largest_head=128),
    "flash_attn": _Candidate(
        title="package flash-attn",
        make=FlashAttnKernel,
        largest_head=256,
        package="flash_attn.flash_attn_interface",
    ),
    "varlen": _Candidate(title="torch.nn.attention.varlen", make=FlashKernel, largest_head=256),
    "sdpa": _Candidate(title="FlashAttention 2 in torch", make=FlashKernel, largest_head=256),
}

LONG_AND_OTHER: KernelName = "cudnn+te"
"""The setting of `LongBlockKernel`, which takes the first kernel for long causal blocks and the
second for all others."""
_LONG: KernelName = "cudnn"
_OTHER: KernelName = "te"

_TITLES: dict[KernelName, str] = {
    **{name: candidate.title for name, candidate in _CANDIDATES.items()},
    LONG_AND_OTHER: (
        f"cuDNN through torch for causal blocks of {SHORTEST_LONG_BLOCK} tokens and more, "
        "through Transformer Engine for all others"
    ),
}
"""Every kernel that `model.attention_kernel` may name, by what the start of a run calls it."""


def choose_kernel(
    setting: KernelName, *, device: torch.device, dtype: torch.dtype, head_dim: int
) -> KernelChoice:
    """Returns the kernel that `model.attention_kernel` names; of `auto` this machine's fastest.

    Raises:
        UserError: if the named kernel is not available; the message says why.
    """
    workload = Workload(device=device, dtype=dtype, head_dim=head_dim)
    plain = _plain_choice(workload)
    if plain is not None and setting in ("auto", "sdpa"):
        return plain
    if setting != "auto":
        kernel, obstacle = _obtain(setting, workload)
        if kernel is None:
            raise UserError(f"model.attention_kernel ({setting}): {obstacle}; use auto")
        return _choice(setting, kernel, rejected={})
    rejected: dict[KernelName, str] = {}
    for name in _preferred(torch.cuda.get_device_capability(device)):
        kernel, obstacle = _obtain(name, workload)
        if kernel is not None:
            return _choice(name, kernel, rejected=rejected)
        rejected[name] = obstacle
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected.items())
    raise UserError(f"model.attention_kernel (auto): no kernel runs on this GPU ({reasons})")


def _plain_choice(workload: Workload) -> KernelChoice | None:
    """Returns the only kernel without a GPU, and for fp32 on one; else None."""
    if workload.device.type == "cpu":
        line = "attention: sdpa (torch's flash kernel for CPUs; there is no GPU)"
        return KernelChoice(setting="sdpa", kernel=CpuFlashKernel(), line=line)
    if workload.dtype == torch.float32:
        line = "attention: sdpa (plain matrix products: fast kernels take bf16, not fp32)"
        return KernelChoice(setting="sdpa", kernel=MathKernel(), line=line)
    return None


def _preferred(capability: tuple[int, int]) -> tuple[KernelName, ...]:
    """Returns the kernels that `auto` tries, the fastest first."""
    if capability >= HOPPER:
        return ("fa4", LONG_AND_OTHER, "te", "cudnn", "sdpa")
    return ("sdpa", "te", "cudnn")


def _obtain(name: KernelName, workload: Workload) -> tuple[AttentionKernel | None, str]:
    """Returns the kernel, or None and the reason."""
    if name != LONG_AND_OTHER:
        return _obtain_one(name, workload)
    parts = []
    for part in (_LONG, _OTHER):
        kernel, obstacle = _obtain_one(part, workload)
        if kernel is None:
            return None, f"no {part}, since {obstacle}"
        parts.append(kernel)
    long, other = parts
    return LongBlockKernel(long=long, other=other), ""


def _obtain_one(name: KernelName, workload: Workload) -> tuple[AttentionKernel | None, str]:
    candidate = _CANDIDATES[name]
    if workload.device.type == "cpu":
        return None, "it needs a GPU"
    if candidate.package is not None and not _is_installed(candidate.package):
        return None, (
            f"the package {candidate.package} is not installed (the {candidate.extra} extra has it)"
        )
    if workload.dtype == torch.float32:
        return None, "it takes bf16, and model.dtype is fp32"
    if workload.head_dim > candidate.largest_head or workload.head_dim % 8:
        return None, (
            f"it takes heads of up to {candidate.largest_head} in steps of 8, and the model's are "
            f"of {workload.head_dim}"
        )
    try:
        kernel = candidate.make()
        error = trial_error(kernel, workload)
    except Exception as failure:  # whatever a package throws where it does not fit
        return None, f"its trial run failed ({_first_line(failure)})"
    if not error <= TRIAL_TOLERANCE:
        return None, f"its trial run was off by {error:.2g}"
    return kernel, ""


def _is_installed(package: str) -> bool:
    """Returns whether a package is there; flash-attn and flash-attn-4 share a folder."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # of the folder around it
        return False


def trial_error(kernel: AttentionKernel, workload: Workload) -> float:
    """Returns the largest relative error of a small run against `MathKernel`.

    NaN counts as infinite.
    """
    generator = torch.Generator(device=workload.device).manual_seed(0)
    exact, scale = MathKernel(), workload.head_dim**-0.5

    def random(length: int, heads: int) -> Tensor:
        shape = length, heads, workload.head_dim
        return torch.randn(shape, generator=generator, device=workload.device, dtype=workload.dtype)

    def error(run: Callable[[AttentionKernel], tuple[Tensor, ...]]) -> float:
        worst = 0.0
        for actual, expected in zip(run(kernel), run(exact), strict=True):
            difference = (actual.float() - expected.float()).norm() / expected.float().norm()
            worst = max(worst, float(difference.nan_to_num(nan=float("inf"))))
        return worst

    errors = []
    for queries, keys, causal in TRIAL_LENGTHS:
        tensors = random(queries, 4), random(keys, 2), random(keys, 2)
        block = one_block(*tensors, causal=causal, scale=scale)
        errors.append(error(functools.partial(_run, block, random(queries, 4))))
    tokens = sum(TRIAL_BLOCKS)
    tensors = random(tokens, 4), random(tokens, 2), random(tokens, 2)
    blocks = causal_blocks(*tensors, TRIAL_BLOCKS, scale=scale)
    errors.append(error(functools.partial(_run, blocks, random(tokens, 4))))
    return max(errors)


def _run(block: Block, output_grad: Tensor, kernel: AttentionKernel) -> tuple[Tensor, ...]:
    attended = kernel.forward(block)
    return *attended, *kernel.backward(block, attended, output_grad)


def _choice(
    name: KernelName, kernel: AttentionKernel, *, rejected: dict[KernelName, str]
) -> KernelChoice:
    line = f"attention: {name} ({_TITLES[name]})"
    for other, reason in rejected.items():
        line += f"; not {other}: {reason}"
    return KernelChoice(setting=name, kernel=kernel, line=line)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
