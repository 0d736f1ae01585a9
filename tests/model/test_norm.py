from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megatron_longpo.model.architectures import Architecture
from megatron_longpo.model.norm import RMSNorm
from megatron_longpo.model.rope_config import RopeConfig
from megatron_longpo.model.spec import transformer_config

TINY = Architecture(
    family="llama",
    num_layers=1,
    hidden_size=32,
    ffn_hidden_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=300,
    norm_eps=1e-6,
    tied_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
    rope=RopeConfig(theta=1e4, scaling=None, max_position_embeddings=64),
)


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"), [("fp32", torch.float32, 1e-6), ("bf16", torch.bfloat16, 2e-2)]
)
def test_forward_is_that_of_transformers_and_backward_agrees(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = RMSNorm(transformer_config(TINY, dtype=name), hidden_size=32, eps=1e-6)  # type: ignore[arg-type]
    theirs = LlamaRMSNorm(32, eps=1e-6).to(dtype)
    weight = 1 + 0.3 * torch.randn(32, generator=generator)
    inputs = []
    for norm in (ours, theirs):
        norm.weight.data.copy_(weight)
    x = (3 * torch.randn(5, 2, 32, generator=generator)).to(dtype)
    outputs = []
    for norm in (ours, theirs):
        inputs.append(x.clone().requires_grad_())
        outputs.append(norm(inputs[-1]))
    assert outputs[0].dtype == dtype
    assert torch.equal(*outputs)
    grad = torch.randn(5, 2, 32, generator=generator).to(dtype)
    for output in outputs:
        output.backward(grad)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=tolerance, atol=tolerance)
    # The sum over rows is ours in float32 and theirs in the weight's dtype.
    torch.testing.assert_close(
        ours.weight.grad, theirs.weight.grad, rtol=tolerance, atol=5 * tolerance
    )


def test_derivatives_are_right_in_double_precision() -> None:
    norm = RMSNorm(transformer_config(TINY, dtype="fp32"), hidden_size=4, eps=1e-2)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def apply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    # The arithmetic inside is float32, hence the coarse step and tolerance.
    assert torch.autograd.gradcheck(apply, (x, weight), eps=1e-2, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sequence", [False, True])
def test_weight_tells_megatron_about_sequence_parallelism(sequence: bool) -> None:
    config = transformer_config(TINY, tensor=2, sequence=sequence)
    weight = RMSNorm(config, hidden_size=32).weight
    assert weight.sequence_parallel is sequence  # type: ignore[attr-defined]
