"""Megatron's CUDA calls on a machine without a GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

from megatron_longpo.parallel import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has CUDA")


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    """For the rest of the session, as in training: there is no way back, and none is needed."""
    cpu.install()
    yield


def test_installing_again_changes_nothing() -> None:
    before = len(_get_current_function_mode_stack())
    cpu.install()
    assert len(_get_current_function_mode_stack()) == before >= 1


def test_cuda_tensors_are_cpu_tensors() -> None:
    made = [
        torch.zeros(2, device="cuda"),
        torch.tensor([1.0], device="cuda:0"),
        torch.empty(2, device=torch.device("cuda", 0)),
        torch.empty(2, device=torch.cuda.current_device()),
        torch.ones(2).cuda(),
        torch.ones(2).to("cuda"),
        torch.ones(2).to(torch.device("cuda")),
        torch.ones(2).to(device="cuda:0", dtype=torch.float64),
        torch.ones(2).new_zeros(3, device="cuda"),
        torch.zeros(2, pin_memory=True),
    ]
    assert [str(tensor.device) for tensor in made] == ["cpu"] * len(made)
    assert made[-3].dtype == torch.float64


def test_other_arguments_are_left_alone() -> None:
    assert torch.zeros(2, device="meta").is_meta
    assert torch.ones(2).to(torch.float64).dtype == torch.float64
    assert torch.ones(2, dtype=torch.float32).type(torch.int64).dtype == torch.int64
    linear = torch.nn.Linear(2, 2).cuda()
    assert linear.weight.device.type == "cpu" and isinstance(linear.weight, torch.nn.Parameter)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float32, "torch.cuda.FloatTensor"), (torch.bfloat16, "torch.cuda.BFloat16Tensor")],
)
def test_types_have_the_names_that_optimizers_know(dtype: torch.dtype, name: str) -> None:
    assert torch.zeros(1, dtype=dtype).type() == name


def test_streams_and_seeds_are_answered() -> None:
    torch.cuda.synchronize()
    torch.cuda.set_device(0)
    with torch.cuda.stream(torch.cuda.current_stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_another_thread_enters_the_mode_itself() -> None:
    """The mode is the thread's own: a worker thread that runs Megatron code has to enter it."""
    outcomes: dict[str, str] = {}

    def work() -> None:
        try:
            torch.zeros(1, device="cuda")
        except (AssertionError, RuntimeError):
            outcomes["without"] = "refused"
        with cpu.CudaMeansCpu():
            outcomes["with"] = str(torch.zeros(1, device="cuda").device)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert outcomes == {"without": "refused", "with": "cpu"}


def test_backward_may_allocate_on_the_current_device() -> None:
    """Megatron's layers do. torch may run backward without the mode, so that only the answered
    functions count there, not the name "cuda"."""

    class AllocatesInBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0] + torch.ones(1, device=torch.cuda.current_device())

    x = torch.ones(1, requires_grad=True)
    torch.autograd.backward(AllocatesInBackward.apply(x))
    assert x.grad is not None and x.grad.item() == 2
