"""RMSprop's fused update on a GPU is torch's own."""

from __future__ import annotations

import pytest
import torch

from megatron_longpo.training import rmsprop
from megatron_longpo.training.rmsprop import RMSprop

pytestmark = pytest.mark.gpu


@pytest.fixture(params=[0, rmsprop.SMALLEST_ALONE], ids=["alone", "together"])
def smallest_alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors each by a kernel of its own, or many at a time."""
    monkeypatch.setattr(rmsprop, "SMALLEST_ALONE", request.param)


@pytest.mark.usefixtures("smallest_alone")
def test_a_state_in_bf16_is_rounded_to_the_nearest() -> None:
    """With small whole numbers for gradients fp32 is exact, so that each bit is known.

    Half of all squares would be others if their last bits were cut off, and many where ties go up.
    """
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(3001, device="cuda"))
    optimizer = RMSprop(
        [param], state_dtype=torch.bfloat16, alpha=0.5, eps=1e-8, lr=0.01, weight_decay=0.0
    )
    kept, moved = torch.zeros(3001, dtype=torch.bfloat16), torch.zeros(3001)
    num_cut = num_ties = 0
    for _ in range(4):
        grad = torch.randint(-255, 256, (3001,), generator=generator).float()
        param.grad = grad.cuda()
        optimizer.step()
        exact = (kept.double() + grad.double() ** 2) / 2
        square = exact.float()
        assert torch.equal(square.double(), exact)
        moved -= 0.01 * grad / (square.sqrt() + 1e-8)
        kept = square.bfloat16()
        lost = square.view(torch.int32) & 0xFFFF
        num_cut += int((lost > 0x8000).sum())
        num_ties += int((lost == 0x8000).sum())
        state = optimizer.state[param]["exp_avg_sq"]
        assert state.dtype == torch.bfloat16 and torch.equal(state.cpu(), kept)
    assert num_cut > 3000 and num_ties > 10
    torch.testing.assert_close(param.detach().cpu(), moved, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("smallest_alone")
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_are_torchs(weight_decay: float) -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    shapes = [(3,), (1000, 17), (2048, 512)]
    start = [torch.randn(shape, generator=generator, device="cuda") for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    mine = RMSprop(ours, alpha=0.9, eps=1e-8, lr=0.01, weight_decay=weight_decay)
    torchs = torch.optim.RMSprop(theirs, lr=0.01, alpha=0.9, eps=1e-8, weight_decay=weight_decay)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator, device="cuda")
            b.grad = a.grad.clone()
        mine.step()
        torchs.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
