"""What heads read on the last stage: final hidden states and the output layer.

Letters: t tokens of a context-parallel rank, h hidden size, v this rank's rows of the padded
vocabulary, s places of the whole pack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_longpo.model.head.logprobs import VocabularyShard
from megatron_longpo.parallel.layout import DivergenceEdges


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputLayer:
    """This tensor-parallel rank's part of a model's output layer."""

    weight: Tensor
    """[v,h]."""
    shard: VocabularyShard
    """The token ids that the rows of `weight` stand for."""

    @staticmethod
    def of(gpt: GPTModel, *, vocab_size: int, tensor_group: ProcessGroup) -> OutputLayer:
        """Returns the output layer of a last stage, whose weight may be the embedding's."""
        _await_parameters(gpt.output_layer)
        weight = (
            gpt.shared_embedding_or_output_weight()
            if gpt.share_embeddings_and_output_weights
            else gpt.output_layer.weight
        )
        shard = VocabularyShard.of_rank(
            rows=weight.shape[0], vocab_size=vocab_size, group=tensor_group
        )
        return OutputLayer(weight=weight, shard=shard)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalStates:
    """The final hidden states of one model, and its output layer."""

    hidden: Tensor
    """[t, 1, h], or under sequence parallelism this tensor-parallel rank's share of it."""
    gpt: GPTModel
    vocab_size: int
    tensor_group: ProcessGroup

    def whole(self) -> Tensor:
        """Returns the states of all of this context rank's tokens, [t, h], on every tensor rank.

        A head's gradient is a tensor rank's part of a sum, which backward adds up here, once. All
        tensor-parallel ranks must call it.
        """
        if self.gpt.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                self.hidden, tensor_parallel_output_grad=True, group=self.tensor_group
            )
        else:
            hidden = copy_to_tensor_model_parallel_region(self.hidden, group=self.tensor_group)
        return hidden.squeeze(1)

    def output_layer(self) -> OutputLayer:
        """Returns the model's output layer."""
        return OutputLayer.of(self.gpt, vocab_size=self.vocab_size, tensor_group=self.tensor_group)


class Head(Protocol):
    """Makes the last stage's output of the final states of policy and reference."""

    def __call__(self, pack: Any, policy: FinalStates, reference: FinalStates | None) -> Tensor:
        """Returns the output of a pack, which is a `RankPack` or derived from it.

        `reference` is None if the pack has no reference tokens.
        """
        ...


def states_of_all_places(
    states: Tensor, places: DivergenceEdges, context_group: ProcessGroup
) -> Tensor:
    """Gathers the states at all places of the pack, [t, h] -> [s, h], on every context rank.

    The same place lies on other context-parallel ranks in the short row than in the long one, so
    the reference's states at places, answers alone, go to all of them.
    """
    whole = states.new_zeros(places.num_slots, states.shape[1])
    whole[places.slots] = states[places.sources]
    if context_group.size() > 1:
        dist.all_reduce(whole, group=context_group)
    return whole


def _await_parameters(module: nn.Module) -> None:
    """Does before a module's weights are read what calling the module would have done first.

    Megatron's DDP waits in forward pre-hooks for weights that are still being gathered
    (`optimizer.overlap_param_gather`), and the output layer's own forward never runs here.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
