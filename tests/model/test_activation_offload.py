"""Activations that leave their device change no number, and leave nothing behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_longpo.config.train import LoraConfig
from megatron_longpo.model import activation_offload
from megatron_longpo.model.activation_offload import ActivationOffload, Offloaded
from megatron_longpo.parallel.groups import Groups
from tests.model.offloaded_steps import CASE, compare, small_blocks, steps
from tests.parity.harness import Shelf
from tests.torchrun import torchrun


@pytest.fixture(autouse=True)
def blocks_of_some_bytes() -> Any:
    with small_blocks():
        yield


def net(device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(6)]
    return nn.Sequential(*layers).to(device)


def gradients(model: nn.Module, offload: ActivationOffload | None, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    if offload is None:
        y = model(x)
    else:
        with offload.forward_pass(model):
            y = model(x)
    y.square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_gradients_are_the_same_and_blocks_are_used_again() -> None:
    model, offload = net(), ActivationOffload(torch.device("cpu"))
    x = torch.randn(9, 32)
    expected = gradients(model, None, x)
    counts = []
    for _ in range(3):
        for ours, theirs in zip(gradients(model, offload, x), expected, strict=True):
            assert torch.equal(ours, theirs)
        counts.append(len(offload._free))
    # 12 tensors of 1,152 bytes: all out, none made anew.
    assert counts == [24, 24, 24]


def test_two_passes_may_be_under_way() -> None:
    """As in a pipeline: forward, forward, backward of the first, backward of the second."""
    model, offload = net(), ActivationOffload(torch.device("cpu"))
    inputs = [torch.randn(9, 32), torch.randn(7, 32)]
    expected = [gradients(model, None, x) for x in inputs]
    outputs = []
    for x in inputs:
        with offload.forward_pass(model):
            outputs.append(model(x).square().sum())
    for output, wanted in zip(outputs, expected, strict=True):
        model.zero_grad()
        output.backward()
        for parameter, gradient in zip(model.parameters(), wanted, strict=True):
            assert parameter.grad is not None and torch.equal(parameter.grad, gradient)


def test_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, offload = net(), ActivationOffload(torch.device("cpu"))
    kept, large = torch.randn(50, 50), torch.randn(50, 50)
    assert offload.put(large) is large, "outside of a pass nothing leaves"
    with offload.forward_pass(model, keep=[kept]):
        taken = offload.put(large.T)
        assert isinstance(taken, Offloaded)
        monkeypatch.setattr(activation_offload, "SMALLEST_BYTES", 10**6)
        assert offload.put(large) is large
    assert torch.equal(offload.fetch(taken), large.T)


def test_strides_come_back() -> None:
    offload = ActivationOffload(torch.device("cpu"))
    base = torch.randn(6, 8, 10)
    views = [
        base,
        base.permute(2, 0, 1),
        base[2:],
        base[..., :5],
        base[:, 3:6].transpose(0, 2),
        base[:, :1].expand(6, 4, 10),
        base[:, :1, :1],
        base[:0],
    ]
    with offload.forward_pass(nn.Identity()):
        taken = [offload.put(view) for view in views]
    # The last ones have not left when they are asked for, the first ones have.
    for kept, view in zip(taken, views, strict=True):
        assert isinstance(kept, Offloaded) or not view.numel()
        back = offload.fetch(kept)
        assert torch.equal(back, view) and back.stride() == view.stride()
    sizes = [len(kept.blocks) for kept in taken if isinstance(kept, Offloaded)]
    assert sizes == [2, 2, 2, 1, 1, 1, 1], "what an expanded tensor repeats is not moved"


@pytest.mark.parametrize(
    ("recompute", "settings"),
    [
        ("none", {}),
        ("all_but_attention", {}),
        ("full", {}),
        ("full", {"recompute_layers": 1}),
        ("none", {"lora": LoraConfig(rank=2)}),
        ("all_but_attention", {"lora": LoraConfig(rank=2), "recompute_layers": 1}),
    ],
)
def test_a_run_is_the_same(
    recompute: Any, settings: Any, shelf: Shelf, single_process: Groups, tmp_path: Path
) -> None:
    expected = steps(shelf, tmp_path / "plain", recompute=recompute, **settings)
    ours = steps(shelf, tmp_path / "offloaded", recompute=recompute, offload=True, **settings)
    compare(ours, expected)
    offload = ours.run.model[0].module._activations
    # A layer's input and, where it is kept, its attention's output, cut into blocks.
    assert len(offload._free) > 2 * CASE.policy.layers


def test_evaluation_moves_nothing(shelf: Shelf, single_process: Groups, tmp_path: Path) -> None:
    run = steps(shelf, tmp_path, recompute="full", offload=True, count=1).run
    offload = run.model[0].module._activations
    offload._free.clear()
    evaluation = replace(run.evaluation, pairs=run.pairs)
    evaluation.run(run.model, budget_tokens=run.budget_tokens)
    assert not offload._free


def test_ranks(shelf: Shelf) -> None:
    """Interleaved stages have several passes under way."""
    shelf.rows_file(CASE)
    for model in (CASE.policy, replace(CASE.reference or CASE.policy)):
        shelf.hf_folder(model)
    result = torchrun("tests/model/offloaded_steps.py", str(shelf.root), ranks=2)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("same: ") == 6, result.stdout[-4000:]


@pytest.mark.gpu
def test_on_a_gpu_memory_is_free_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 tensors of 64 MiB are kept; three of them are on the GPU at a time."""
    monkeypatch.setattr(activation_offload, "SMALLEST_BYTES", 2**20)
    monkeypatch.setattr(activation_offload, "BLOCK_BYTES", 48 * 2**20)
    model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(16)]).cuda()
    offload = ActivationOffload(torch.device("cuda"))
    x = torch.randn(16384, 1024, device="cuda", requires_grad=True)
    expected = gradients(model, None, x)
    peaks = []
    for chosen in (None, offload, offload):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        ours = gradients(model, chosen, x)
        peaks.append(torch.cuda.max_memory_allocated())
        for mine, theirs in zip(ours, expected, strict=True):
            assert torch.equal(mine, theirs)
    assert peaks[0] - peaks[2] > 8 * 64 * 2**20
    assert all(block.memory.is_pinned() for block in offload._free)
