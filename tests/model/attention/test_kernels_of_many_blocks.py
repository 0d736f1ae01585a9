"""Kernels of variable lengths, on stand-ins that read lengths as the packages say they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_longpo.data.trees.forest import NO_PARENT
from megatron_longpo.model.attention import fa4_kernel
from megatron_longpo.model.attention.blocks import Attended, block_ends, one_block
from megatron_longpo.model.attention.fa4_kernel import FlashAttention4Kernel
from megatron_longpo.model.attention.gpu_kernels import FlashKernel
from megatron_longpo.model.attention.kernel_choice import TRIAL_TOLERANCE, Workload, trial_error
from megatron_longpo.model.attention.kernels import AttentionKernel, CpuFlashKernel
from megatron_longpo.model.attention.te_kernel import TransformerEngineKernel
from megatron_longpo.model.attention.tree_attention import attend, attend_backward
from megatron_longpo.parallel.layout import lay_out
from tests.model.attention.dense_attention import dense_attention, dense_gradients
from tests.model.attention.test_kernels import random_block
from tests.model.attention.test_tree_attention import make_forest, tree_mask

CPU = torch.device("cpu")
WORKLOAD = Workload(device=CPU, dtype=torch.bfloat16, head_dim=16)


class Sequences:
    """Attention of each sequence by itself; counts calls."""

    def __init__(self) -> None:
        self.exact = CpuFlashKernel()
        self.calls = 0

    def spans(self, query_ends: Tensor, key_ends: Tensor, longest: tuple[int, int]) -> Any:
        for ends, most in zip((query_ends, key_ends), longest, strict=True):
            assert ends.dtype == torch.int32 and int(ends.diff().max()) == most
        self.calls += 1
        bounds = zip(
            *(ends.tolist()[first:last] for ends in (query_ends, key_ends) for first, last in CUTS),
            strict=True,
        )
        for query_start, query_stop, key_start, key_stop in bounds:
            yield slice(query_start, query_stop), slice(key_start, key_stop)

    def forward(
        self, tensors: Any, ends: Any, longest: Any, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        query, key, value = tensors
        output = torch.full_like(query, torch.nan)
        accumulator = torch.promote_types(query.dtype, torch.float32)
        logsumexp = query.new_zeros(query.shape[1::-1], dtype=accumulator)
        for queries, keys in self.spans(*ends, longest):
            output[queries], logsumexp[:, queries] = self.exact.forward(
                one_block(query[queries], key[keys], value[keys], causal=causal, scale=scale)
            )
        return output, logsumexp

    def backward(
        self, tensors: Any, ends: Any, longest: Any, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, query, key, value, output, logsumexp = tensors
        gradients = tuple(torch.full_like(tensor, torch.nan) for tensor in (query, key, value))
        for queries, keys in self.spans(*ends, longest):
            parts = self.exact.backward(
                one_block(query[queries], key[keys], value[keys], causal=causal, scale=scale),
                Attended(output, logsumexp).rows(queries),
                grad[queries],
            )
            for gradient, rows, part in zip(gradients, (queries, keys, keys), parts, strict=True):
                gradient[rows] = part
        query_grad, key_grad, value_grad = gradients
        return query_grad, key_grad, value_grad


CUTS = ((None, -1), (1, None))
"""Starts and stops among ends."""


class TransformerEngine:
    """`transformer_engine.pytorch.cpp_extensions.fused_attn` of tensors [t,heads,D]."""

    def __init__(self, sequences: Sequences, *, packs: bool) -> None:
        self.FusedAttnBackend = {"F16_arbitrary_seqlen": 1}
        self.sequences = sequences
        self.packs = packs

    def read(self, tensors: Any, ends: Any, settings: dict[str, Any]) -> bool:
        """Whether the mask is causal."""
        assert all(tensor.is_contiguous() for tensor in tensors)
        assert settings["qkv_layout"] == "thd_thd_thd" and settings["o_format"] == "thd"
        assert settings["cu_seqlens_q_padded"] is ends[0]
        assert settings["cu_seqlens_kv_padded"] is ends[1]
        causal: bool = settings["attn_mask_type"] == "padding_causal"
        assert settings["window_size"] == ((-1, 0) if causal else (-1, -1))
        return causal

    def fused_attn_fwd(self, is_training: bool, *arguments: Any, **settings: Any) -> Any:
        longest, ends, tensors = arguments[:2], arguments[2:4], arguments[4:7]
        causal = self.read(tensors, ends, settings)
        output, logsumexp = self.sequences.forward(
            tensors, ends, longest, causal=causal, scale=settings["attn_scale"]
        )
        statistics = logsumexp.T.contiguous().unsqueeze(-1)
        if not self.packs:
            assert len(ends[0]) == 2, "padded statistics of many sequences are not read"
            statistics = logsumexp[None, :, :, None].contiguous()
        return output, [statistics, torch.zeros(2)]

    def fused_attn_bwd(self, *arguments: Any, **settings: Any) -> Any:
        longest, ends, tensors = arguments[:2], arguments[2:4], arguments[4:9]
        (statistics, _), (query, key, value, output, grad) = arguments[10], tensors
        causal = self.read((*tensors, statistics), ends, settings)
        assert settings["do_format"] == "thd" and settings["dqkv_layout"] == "thd_thd_thd"
        assert statistics.dim() == (3 if self.packs else 4)
        logsumexp = statistics.squeeze(-1).T if self.packs else statistics[0, ..., 0]
        gradients = self.sequences.backward(
            (grad, query, key, value, output, logsumexp),
            ends,
            longest,
            causal=causal,
            scale=settings["attn_scale"],
        )
        return *gradients, None, None


class FlashAttention4:
    """`flash_attn.cute.interface`: [1,t,heads,D] without lengths, [t,heads,D] with them."""

    def __init__(self, sequences: Sequences) -> None:
        self.sequences = sequences

    def _flash_attn_fwd(
        self, *tensors: Tensor, softmax_scale: float, causal: bool, return_lse: bool, **of: Any
    ) -> Any:
        assert return_lse
        if not of:
            flat = [tensor.squeeze(0) for tensor in tensors]
            longest = (len(flat[0]), len(flat[1]))
            output, logsumexp = self.sequences.forward(
                flat, whole(longest), longest, causal=causal, scale=softmax_scale
            )
            return output[None], logsumexp[None], None, None, None
        output, logsumexp = self.sequences.forward(
            tensors, *self.read(of), causal=causal, scale=softmax_scale
        )
        return output, logsumexp, None, None, None

    def _flash_attn_bwd(self, *arguments: Any, **of: Any) -> Any:
        *tensors, scale, causal = arguments
        query, key, value, output, grad, logsumexp = tensors
        assert logsumexp.is_contiguous()
        ordered = [grad, query, key, value, output, logsumexp]
        if of:
            return self.sequences.backward(ordered, *self.read(of), causal=causal, scale=scale)
        flat = [tensor.squeeze(0) for tensor in ordered]
        longest = (len(flat[1]), len(flat[2]))
        gradients = self.sequences.backward(
            flat, whole(longest), longest, causal=causal, scale=scale
        )
        return tuple(gradient[None] for gradient in gradients)

    @staticmethod
    def read(of: dict[str, Any]) -> tuple[Any, Any]:
        """Ends and longest lengths."""
        ends = (of.pop("cu_seqlens_q"), of.pop("cu_seqlens_k"))
        longest = (of.pop("max_seqlen_q"), of.pop("max_seqlen_k"))
        assert not of
        return ends, longest


def whole(lengths: tuple[int, int]) -> list[Tensor]:
    """Ends of one sequence of queries and one of keys."""
    return [torch.tensor([0, length], dtype=torch.int32) for length in lengths]


@pytest.fixture
def sequences() -> Sequences:
    return Sequences()


@pytest.fixture(params=["te", "older te", "flash", "fa4"])
def kernel(
    request: pytest.FixtureRequest, sequences: Sequences, monkeypatch: pytest.MonkeyPatch
) -> AttentionKernel:
    block_ends.cache_clear()
    if request.param == "fa4":
        monkeypatch.setattr("importlib.import_module", lambda name: FlashAttention4(sequences))
        # Long enough for some blocks of these tests, too long for others.
        monkeypatch.setattr(fa4_kernel, "SHORTEST_DENSE_BLOCK", 150)
        return FlashAttention4Kernel()
    if request.param != "flash":
        package = TransformerEngine(sequences, packs=request.param == "te")
        monkeypatch.setattr("importlib.import_module", lambda name: package)
        return TransformerEngineKernel()

    def forward(q: Any, k: Any, v: Any, *rest: Any, scale: float) -> Any:
        *ends_and_longest, dropout, causal, returns_mask = rest
        assert dropout == 0 and not returns_mask
        ends, longest = ends_and_longest[:2], ends_and_longest[2:]
        if ends[0] is None:
            output, logsumexp = sequences.forward(
                (q[0], k[0], v[0]), whole(longest), longest, causal=causal, scale=scale
            )
            return output[None], logsumexp[None]
        return *sequences.forward((q, k, v), ends, longest, causal=causal, scale=scale), None

    def backward(*arguments: Any, scale: float) -> Any:
        tensors, ends, longest = arguments[:6], arguments[6:8], arguments[8:10]
        assert tensors[5].is_contiguous() and arguments[10] == 0
        causal = arguments[11]
        if ends[0] is None:
            tensors = tuple(tensor[0] for tensor in tensors)
            gradients = sequences.backward(
                tensors, whole(longest), longest, causal=causal, scale=scale
            )
            return tuple(gradient[None] for gradient in gradients)
        return sequences.backward(tensors, ends, longest, causal=causal, scale=scale)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    return FlashKernel()


def test_it_passes_the_trial(kernel: AttentionKernel) -> None:
    assert trial_error(kernel, WORKLOAD) < TRIAL_TOLERANCE


@pytest.mark.parametrize(
    ("parents", "lengths", "num_contexts"),
    [
        ([NO_PARENT], [9], 0),
        ([NO_PARENT, 0, 0], [9, 3, 4], 1),
        ([NO_PARENT, 0, 1, 0, NO_PARENT, 4, 4], [3, 2, 2, 4, 5, 2, 3], 2),
    ],
    ids=["row", "pair", "two trees"],
)
def test_all_blocks_of_a_forest_are_one_call(
    parents: list[int],
    lengths: list[int],
    num_contexts: int,
    kernel: AttentionKernel,
    sequences: Sequences,
) -> None:
    """And one for each run of tokens that hangs on others; both ways."""
    plan = lay_out(make_forest(parents, lengths), device=CPU).attention
    total = sum(lengths)
    inputs, grad = random_block(total, total, 4, 2, 8, dtype=torch.float64)
    entered = (inputs[0], inputs[1], inputs[2])
    mask = tree_mask(make_forest(parents, lengths), total)
    trial_error(kernel, WORKLOAD)  # what every kernel goes through first
    sequences.calls = 0
    output, logsumexp = attend(entered, plan, kernel, scale=0.3)
    expected, expected_logsumexp = dense_attention(inputs, mask, 0.3)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(logsumexp, expected_logsumexp)
    grads = attend_backward(grad, entered, output, logsumexp, plan, kernel, scale=0.3)
    for actual, wanted in zip(grads, dense_gradients(inputs, mask, 0.3, grad), strict=True):
        torch.testing.assert_close(actual, wanted)
    own_calls = 1 if getattr(kernel, "takes_many", True) else len(plan.pieces)
    assert sequences.calls == 2 * (own_calls + num_contexts)


def test_lengths_are_made_into_tensors_once() -> None:
    assert block_ends((3, 4), CPU).tolist() == [0, 3, 7]
    assert block_ends((3, 4), CPU) is block_ends((3, 4), CPU)
