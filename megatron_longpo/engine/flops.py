"""Floating-point operations of a step, as contract.md section 5 counts them.

Recomputation and padding are not counted: the numbers are what the model needs.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_longpo.config.train import LoraConfig
from megatron_longpo.data.trees.packing import PairSize
from megatron_longpo.model.architectures import Architecture

FORWARD_SHARE = 1 / 3
"""A forward pass costs a third of forward and backward."""


def step_flops(
    sizes: Iterable[PairSize],
    policy: Architecture,
    reference: Architecture | None,
    *,
    lora: LoraConfig | None = None,
) -> float:
    """Returns the operations of one global batch over all GPUs.

    The policy runs forward and backward, the reference forward. With adapters no gradient of the
    frozen matrices is computed, which saves a third of their operations.
    """
    total = 0.0
    for size in sizes:
        work = (size.policy_tokens, size.policy_attended, size.policy_edges)
        if lora is None:
            total += _training_flops(policy, *work)
        else:
            total += _training_flops(policy, *work, per_parameter=4)
            total += 6.0 * policy.num_layers * adapter_parameters(policy, lora) * work[0]
        if reference is not None:
            total += FORWARD_SHARE * _training_flops(
                reference, size.reference_tokens, size.reference_attended, size.reference_edges
            )
    return total


def layer_parameters(arch: Architecture) -> int:
    """Returns the number of parameters in a layer's matrices: q, k, v, output, gate, up, down."""
    attention_width = arch.num_heads * arch.head_dim
    kv_width = arch.num_kv_heads * arch.head_dim
    return arch.hidden_size * (2 * attention_width + 2 * kv_width + 3 * arch.ffn_hidden_size)


def adapter_parameters(arch: Architecture, lora: LoraConfig) -> int:
    """Returns the number of parameters in one layer's adapters."""
    attention_width = arch.num_heads * arch.head_dim
    kv_width = arch.num_kv_heads * arch.head_dim
    inputs_and_outputs = {
        "linear_qkv": arch.hidden_size + attention_width + 2 * kv_width,
        "linear_proj": attention_width + arch.hidden_size,
        "linear_fc1": arch.hidden_size + 2 * arch.ffn_hidden_size,
        "linear_fc2": arch.ffn_hidden_size + arch.hidden_size,
    }
    return lora.rank * sum(inputs_and_outputs[target] for target in lora.targets)


def _training_flops(
    arch: Architecture, tokens: int, attended: int, edges: int, *, per_parameter: int = 6
) -> float:
    linears = per_parameter * arch.num_layers * layer_parameters(arch) * tokens
    attention = 12 * arch.num_layers * arch.num_heads * arch.head_dim * attended
    head = per_parameter * arch.hidden_size * arch.vocab_size * edges
    return float(linears + attention + head)
