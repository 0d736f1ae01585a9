"""Which kernel is taken, and what is said about it, on machines that this one stands in for."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from megatron_longpo.config.names import AttentionKernel as KernelName
from megatron_longpo.errors import UserError
from megatron_longpo.model.attention import kernel_choice
from megatron_longpo.model.attention.blocks import Attended, Block, Gradients
from megatron_longpo.model.attention.fa4_kernel import FlashAttention4Kernel
from megatron_longpo.model.attention.gpu_kernels import CudnnKernel, FlashKernel
from megatron_longpo.model.attention.kernel_choice import (
    KernelChoice,
    Workload,
    choose_kernel,
    trial_error,
)
from megatron_longpo.model.attention.kernels import CpuFlashKernel, MathKernel
from megatron_longpo.model.attention.long_blocks import LongBlockKernel
from megatron_longpo.model.attention.te_kernel import TransformerEngineKernel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NO_FA4 = "the package flash_attn.cute is not installed (the fa4 extra has it)"


NAMES: tuple[KernelName, ...] = get_args(KernelName)


def choose(
    setting: KernelName = "auto",
    *,
    device: torch.device = CUDA,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
) -> KernelChoice:
    return choose_kernel(setting, device=device, dtype=dtype, head_dim=head_dim)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hopper GPU with every package, where every kernel passes its trial."""
    machine(monkeypatch, capability=(9, 0))


def machine(
    monkeypatch: pytest.MonkeyPatch,
    *,
    capability: tuple[int, int],
    packages: tuple[str, ...] = (
        "flash_attn.cute",
        "flash_attn.flash_attn_interface",
        "transformer_engine",
    ),
    errors: dict[type, float | Exception] | None = None,
) -> None:
    def trial(kernel: Any, workload: Workload) -> float:
        error = (errors or {}).get(type(kernel), 0.0)
        if isinstance(error, Exception):
            raise error
        return error

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: object() if name in packages else None
    )
    monkeypatch.setattr("importlib.import_module", lambda name: object())
    monkeypatch.setattr(kernel_choice, "trial_error", trial)


@pytest.mark.parametrize("setting", ["auto", "sdpa"])
@pytest.mark.parametrize(
    ("device", "dtype", "kernel"),
    [
        (CPU, torch.float32, CpuFlashKernel),
        (CPU, torch.bfloat16, CpuFlashKernel),
        (CUDA, torch.float32, MathKernel),
    ],
)
def test_without_a_gpu_or_in_fp32_there_is_nothing_to_choose(
    setting: KernelName, device: torch.device, dtype: torch.dtype, kernel: type
) -> None:
    chosen = choose(setting, device=device, dtype=dtype)
    assert isinstance(chosen.kernel, kernel) and chosen.line.startswith("attention: sdpa")


@pytest.mark.parametrize("setting", ["auto", "fa4"])
def test_hopper_takes_flash_attention_4(hopper: None, setting: str) -> None:
    chosen = choose(setting)
    assert isinstance(chosen.kernel, FlashAttention4Kernel) and chosen.setting == "fa4"
    assert chosen.line == "attention: fa4 (FlashAttention 4)"


def test_flash_attention_4_that_errs_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for heads of 80, whose gradients version 4.0.0b36 gets wrong."""
    machine(monkeypatch, capability=(9, 0), errors={FlashAttention4Kernel: 1.1})
    chosen = choose(head_dim=80)
    assert chosen.setting == "cudnn+te"
    assert chosen.line.endswith("; not fa4: its trial run was off by 1.1")


@pytest.mark.parametrize("setting", ["auto", "cudnn+te"])
def test_without_it_hopper_takes_cudnn_by_the_length_of_a_block(
    monkeypatch: pytest.MonkeyPatch, setting: KernelName
) -> None:
    machine(monkeypatch, capability=(9, 0), packages=("transformer_engine",))
    chosen = choose(setting)
    assert isinstance(chosen.kernel, LongBlockKernel) and chosen.setting == "cudnn+te"
    assert isinstance(chosen.kernel.long, CudnnKernel)
    assert isinstance(chosen.kernel.other, TransformerEngineKernel)
    assert chosen.line == (
        "attention: cudnn+te (cuDNN through torch for causal blocks of 25600 tokens and more, "
        "through Transformer Engine for all others)"
        + ("; not fa4: " + NO_FA4 if setting == "auto" else "")
    )


def test_without_torchs_cudnn_transformer_engine_has_all_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(
        monkeypatch,
        capability=(9, 0),
        packages=("transformer_engine",),
        errors={CudnnKernel: RuntimeError("no engine")},
    )
    chosen = choose()
    assert isinstance(chosen.kernel, TransformerEngineKernel)
    assert chosen.line == (
        f"attention: te (cuDNN through Transformer Engine); not fa4: {NO_FA4}; not cudnn+te: no "
        "cudnn, since its trial run failed (RuntimeError: no engine)"
    )


def test_an_older_gpu_takes_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, capability=(8, 0))
    assert isinstance(choose().kernel, FlashKernel)


@pytest.mark.parametrize("setting", NAMES)
def test_every_name_of_the_config_is_known(hopper: None, setting: KernelName) -> None:
    chosen = choose(setting)
    assert chosen.setting == ("fa4" if setting == "auto" else setting)
    assert chosen.line.startswith(f"attention: {chosen.setting} (")


def test_every_known_kernel_is_a_name_of_the_config() -> None:
    assert {"auto", *kernel_choice._TITLES} == set(NAMES)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, capability=(9, 0), packages=())
    chosen = choose()
    assert isinstance(chosen.kernel, CudnnKernel)
    assert "; not te: the package transformer_engine is not installed" in chosen.line


def test_a_kernel_that_fails_or_errs_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: dict[type, float | Exception] = {
        TransformerEngineKernel: RuntimeError("no cuDNN engine\nat line 1"),
        CudnnKernel: float("nan"),
    }
    machine(monkeypatch, capability=(9, 0), packages=("transformer_engine",), errors=errors)
    chosen = choose()
    assert isinstance(chosen.kernel, FlashKernel)
    assert "not te: its trial run failed (RuntimeError: no cuDNN engine)" in chosen.line
    assert "not cudnn: its trial run was off by nan" in chosen.line


@pytest.mark.parametrize(
    ("setting", "circumstances", "message"),
    [
        ("te", {"device": CPU}, r"\(te\): it needs a GPU; use auto"),
        ("cudnn+te", {"device": CPU}, r"\(cudnn\+te\): no cudnn, since it needs a GPU; use auto"),
        ("cudnn", {"dtype": torch.float32}, r"\(cudnn\): it takes bf16, and model\.dtype is fp32"),
        ("te", {"head_dim": 256}, r"\(te\): it takes heads of up to 128 .* are of 256"),
        ("sdpa", {"head_dim": 100}, r"\(sdpa\): it takes heads .* in steps of 8"),
    ],
)
def test_a_forced_kernel_that_cannot_run_is_refused(
    hopper: None, setting: KernelName, circumstances: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=r"model\.attention_kernel " + message):
        choose(setting, **circumstances)


@pytest.mark.parametrize("setting", ["fa4", "cudnn+te", "te", "flash_attn"])
def test_a_forced_kernel_whose_package_is_missing_is_refused(
    setting: KernelName, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, capability=(9, 0), packages=())
    with pytest.raises(
        UserError, match=rf"\({re.escape(setting)}\): .*the package .* is not installed"
    ):
        choose(setting)


def test_no_kernel_at_all_says_why_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, capability=(9, 0), packages=())
    with pytest.raises(UserError, match=r"te: the package .*; cudnn: it takes .*; sdpa: it takes"):
        choose(head_dim=512)


class SkewedKernel(CpuFlashKernel):
    """Its gradient of the values is 10 % too large."""

    def backward(self, block: Block, attended: Attended, output_grad: Tensor) -> Gradients:
        query_grad, key_grad, value_grad = super().backward(block, attended, output_grad)
        return query_grad, key_grad, 1.1 * value_grad


class OneBlockKernel(CpuFlashKernel):
    """Takes many blocks for one."""

    def forward(self, block: Block) -> Attended:
        return self.forward_one(block)


def test_the_trial_tells_a_right_kernel_from_a_wrong_one() -> None:
    workload = Workload(device=CPU, dtype=torch.bfloat16, head_dim=64)
    assert trial_error(CpuFlashKernel(), workload) < kernel_choice.TRIAL_TOLERANCE
    assert trial_error(SkewedKernel(), workload) == pytest.approx(0.1, rel=0.1)
    assert trial_error(OneBlockKernel(), workload) > kernel_choice.TRIAL_TOLERANCE
