"""Low-rank adapters (LoRA, Hu et al. 2021) on Megatron's linear layers.

    y = W x + alpha / rank * B A x

W is frozen; A and B train. An adapter is a submodule of the linear layer that it changes, so that
the base keeps its parameter names: `...linear_qkv.adapter.lora_a` [r, i] and `...lora_b` [o, r].
B is laid out as W's rows are: key/value head by head for `linear_qkv`, gate above up for
`linear_fc1`. Queries, keys and values share one A, and so do gate and up.

Under tensor parallelism each rank of a column-parallel layer has all of A and its rows of B, of a
row-parallel one its columns of A and all of B. What the ranks exchange has `rank` columns.

Letters: s tokens on this rank, i and o this rank's input and output size of a layer, r the rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_longpo.config.names import LoraTarget
from megatron_longpo.config.train import LoraConfig
from megatron_longpo.errors import UserError
from megatron_longpo.parallel.groups import megatron_groups

ADAPTER_NAME = "adapter"
TARGETS = {
    "linear_qkv": "self_attention",
    "linear_proj": "self_attention",
    "linear_fc1": "mlp",
    "linear_fc2": "mlp",
}
"""The layers that may have an adapter, and the part of a transformer layer that they are in."""

Split = Literal["column", "row"]


def attach_adapters(
    gpt: GPTModel, config: LoraConfig, *, seed: int, tensor_group: ProcessGroup
) -> None:
    """Freezes `gpt`, whose weights are loaded, and adds adapters that change nothing yet (B = 0).

    Call it before the model is wrapped, so that gradients and optimizer state are the adapters'.
    """
    gpt.requires_grad_(False)
    for layer in gpt.decoder.layers:
        for target in (target for target in TARGETS if target in config.targets):
            linear = getattr(getattr(layer, TARGETS[target]), target)
            adapter = Adapter(
                linear,
                config,
                target=target,
                layer=layer.layer_number - 1,
                seed=seed,
                is_sequence_parallel=gpt.config.sequence_parallel,
                tensor_group=tensor_group,
            )
            linear.add_module(ADAPTER_NAME, adapter)
            linear.register_forward_hook(_add_update)
    if gpt.pre_process:
        gpt.embedding.register_forward_hook(_require_gradient)


def adapters(gpt: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Yields the adapters of this rank's chunk with their names in it."""
    for name, module in gpt.named_modules():
        if isinstance(module, Adapter):
            yield name, module


def is_adapter_parameter(name: str) -> bool:
    return f".{ADAPTER_NAME}." in name


@contextmanager
def adapters_off(gpt: GPTModel) -> Iterator[None]:
    """Makes `gpt` the frozen base inside: adapters off, and eval mode, which recomputes nothing."""
    was_training, found = gpt.training, [adapter for _, adapter in adapters(gpt)]
    gpt.eval()
    for adapter in found:
        adapter.is_on = False
    try:
        yield
    finally:
        for adapter in found:
            adapter.is_on = True
        gpt.train(was_training)


class Adapter(nn.Module):
    """A and B of one linear layer: this tensor-parallel rank's parts."""

    def __init__(
        self,
        linear: nn.Module,
        config: LoraConfig,
        *,
        target: LoraTarget,
        layer: int,
        seed: int,
        is_sequence_parallel: bool,
        tensor_group: ProcessGroup,
    ) -> None:
        super().__init__()
        self.target = target
        self.layer = layer
        """The layer's number in the whole model, from 0."""
        self.scale = config.scale
        self.split: Split = _split_of(linear, target)
        self.is_on = True
        self._is_sequence_parallel = is_sequence_parallel
        self._group = tensor_group
        _refuse_fused_norm(linear, target)
        weight: Any = linear.weight
        out_features, in_features = weight.shape
        ranks = tensor_group.size() if self.split == "row" else 1
        whole = initial_a((config.rank, in_features * ranks), seed=seed, layer=layer, target=target)
        own = whole.chunk(ranks, dim=1)[tensor_group.rank() if ranks > 1 else 0]
        self.lora_a = nn.Parameter(own.to(weight).contiguous())
        self.lora_b = nn.Parameter(weight.new_zeros(out_features, config.rank))
        self._mark_for_megatron()

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """Returns W x + scale B A x, from x [s, 1, i] and W x [s, 1, o].

        The result has the tokens of W x. Under sequence parallelism the input of a column-parallel
        layer and the output of a row-parallel one have this rank's share of the tokens.
        """
        inner = x @ self.lora_a.T * self.scale
        if self.split == "column":
            # The gradient that comes back for `inner` is a sum over the ranks' rows of B.
            if self._is_sequence_parallel:
                inner = gather_from_sequence_parallel_region(
                    inner, tensor_parallel_output_grad=True, group=self._group
                )
            else:
                inner = copy_to_tensor_model_parallel_region(inner, group=self._group)
        elif self._is_sequence_parallel:
            inner = reduce_scatter_to_sequence_parallel_region(inner, group=self._group)
        else:
            inner = reduce_from_tensor_model_parallel_region(inner, group=self._group)
        # One product and sum: B A x, as large as the output, is never in memory beside it.
        updated = torch.addmm(base_output.flatten(0, -2), inner.flatten(0, -2), self.lora_b.T)
        return updated.view_as(base_output)

    def sharded_state(self, num_layers: int) -> dict[str, Any]:
        """Returns both matrices for dist_checkpointing, each a row of a stack over layers."""
        prefix = f"decoder.layers.{TARGETS[self.target]}.{self.target}.{ADAPTER_NAME}."
        offsets = ((0, self.layer, num_layers),)
        split_axes = {"lora_b": 0} if self.split == "column" else {"lora_a": 1}
        groups = megatron_groups()
        sharded = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            split_axes,
            offsets,
            tp_group=groups.tp,
            dp_cp_group=groups.dp_cp,
        )
        if self.target == "linear_fc1":
            # Each rank holds its part of the gate above its part of the up projection.
            key = prefix + "lora_b"
            sharded[key] = apply_swiglu_sharded_factory(sharded[key], offsets)
        return {key.removeprefix(prefix): tensor for key, tensor in sharded.items()}

    def _mark_for_megatron(self) -> None:
        """Marks whose gradients Megatron sums over tensor-parallel ranks, and whose norms."""
        is_column = self.split == "column"
        sharded, copied = self.lora_b, self.lora_a
        if not is_column:
            sharded, copied = copied, sharded
        set_tensor_model_parallel_attributes(sharded, True, 0 if is_column else 1, 1)
        # With sequence parallelism it is multiplied by this rank's tokens alone.
        copied.sequence_parallel = self._is_sequence_parallel  # type: ignore[attr-defined]


def adapter_state(gpt: GPTModel) -> dict[str, Any]:
    """Returns the sharded state of the adapters alone, by their names in this chunk."""
    return {
        f"{name}.{leaf}": tensor
        for name, adapter in adapters(gpt)
        for leaf, tensor in adapter.sharded_state(gpt.config.num_layers).items()
    }


def load_adapter_state(gpt: GPTModel, state: Mapping[str, Tensor]) -> None:
    """Writes what `dist_checkpointing.load` returned for `adapter_state` into the adapters."""
    parameters = {
        f"{name}.{leaf}": parameter
        for name, adapter in adapters(gpt)
        for leaf, parameter in adapter.named_parameters()
    }
    assert set(state) == set(parameters), set(state) ^ set(parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def initial_a(shape: tuple[int, int], *, seed: int, layer: int, target: LoraTarget) -> Tensor:
    """Returns the first A of a layer, [r, all of i] in fp32, the same under any layout.

    It is PEFT's kaiming-uniform with a = sqrt(5), which is uniform within 1 / sqrt(i).
    """
    digest = hashlib.sha256(f"lora/{seed}/{layer}/{target}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def _split_of(linear: nn.Module, target: LoraTarget) -> Split:
    """Returns how tensor-parallel ranks share the layer's matrix."""
    if isinstance(linear, tensor_parallel.ColumnParallelLinear):
        return "column"
    if isinstance(linear, tensor_parallel.RowParallelLinear):
        return "row"
    # Transformer Engine's layers, which Megatron's wrappers derive from, say it themselves.
    mode = getattr(linear, "parallel_mode", None)
    if mode not in ("column", "row"):
        raise UserError(
            f"lora.targets ({target}): this model's {target} is a {type(linear).__name__}, which "
            "is split in a way that adapters do not know; leave it out of lora.targets"
        )
    return mode


def _refuse_fused_norm(linear: nn.Module, target: LoraTarget) -> None:
    """Refuses a layer that normalises its own input: A needs the input of W.

    To support such layers, `_add_update` would have to normalise the input first.
    """
    if hasattr(linear, "layer_norm_weight"):
        raise UserError(
            f"lora.targets ({target}): this model's {target} is a {type(linear).__name__}, which "
            "normalises its own input, and adapters need a norm of its own; leave it out of "
            "lora.targets"
        )


def _add_update(linear: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward hook of a linear layer, which returns its output and the bias that it left out.

    Adds the adapter's update to the output.
    """
    adapter: Adapter = getattr(linear, ADAPTER_NAME)
    if not adapter.is_on:
        return output
    base_output, *rest = output
    return (adapter(inputs[0], base_output), *rest)


def _require_gradient(embedding: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook that makes the output require a gradient.

    Recomputed layers pass gradients on only if their input requires one.
    """
    return output.requires_grad_() if torch.is_grad_enabled() else output
