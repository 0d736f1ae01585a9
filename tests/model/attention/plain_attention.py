"""A core attention for tests of everything around it, and the forward pass of the whole model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_longpo.model.architectures import Architecture
from megatron_longpo.model.rope import inverse_frequencies, rotary_angles


class PlainAttention(torch.nn.Module):
    """Causal attention over one sequence: [T,1,heads,dim], [T,1,groups,dim] -> [T,1,heads*dim]."""

    def __init__(self, *, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        output = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True, scale=self.scale
        )
        return output.permute(2, 0, 1, 3).flatten(2)


def forward_logits(model: GPTModel, arch: Architecture, input_ids: Tensor) -> Tensor:
    """[T] token ids of one sequence -> [T, vocabulary] logits, without the padding rows."""
    hidden = model.embedding(input_ids=input_ids[None], position_ids=None)
    angles = rotary_angles(inverse_frequencies(arch), torch.arange(len(input_ids)))
    hidden = model.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=angles)
    weight = model.shared_embedding_or_output_weight() if arch.tied_embeddings else None
    logits, _ = model.output_layer(hidden, weight=weight)
    return logits[:, 0, : arch.vocab_size]
