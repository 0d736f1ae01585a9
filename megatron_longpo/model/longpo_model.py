"""Policy and reference in one module: the reference rides in the policy's pipeline pass.

Letters: p and r policy and reference tokens on this rank, padding included; h hidden size; e edges
of this rank, the policy's before the reference's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_longpo.model.logprob_head import VocabularyShard, edge_logps
from megatron_longpo.model.rope import rotary_angles
from megatron_longpo.parallel.layout import RankPack, RankTokens


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkModel:
    """One pipeline chunk of a language model, with what GPTModel does not know about itself."""

    gpt: GPTModel
    inv_freq: Tensor
    """[head_dim / 2] fp32, radians a position; no buffer, which `.bfloat16()` would round."""
    vocab_size: int
    """Token ids that exist; the embedding's further rows are padding."""


class LongPOModel(MegatronModule):
    """A pipeline chunk of the policy and, beside it, the same layers of the frozen reference.

    Under pipeline parallelism what travels between stages is one tensor, `[policy tokens |
    reference tokens]`; every stage knows both lengths from the pack. The policy runs with
    gradients, the reference without. Megatron sees the policy: its config, its embeddings and, in
    checkpoints, its parameters under the keys of a plain GPTModel.
    """

    def __init__(
        self, *, policy: ChunkModel, reference: ChunkModel | None, tensor_group: ProcessGroup
    ) -> None:
        super().__init__(config=policy.gpt.config)
        self.policy = policy.gpt
        self.reference = reference.gpt if reference is not None else None
        self._chunks = {"policy": policy, "reference": reference}
        self._tensor_group = tensor_group
        self._received: Tensor | None = None
        self.model_type = policy.gpt.model_type
        self.vp_stage = policy.gpt.vp_stage
        self.pre_process: bool = policy.gpt.pre_process
        self.post_process: bool = policy.gpt.post_process
        self.share_embeddings_and_output_weights = policy.gpt.share_embeddings_and_output_weights
        if self.reference is not None:
            self.reference.requires_grad_(False)
            self.reference.eval()

    def forward(self, pack: RankPack) -> Tensor:
        """Runs this stage.

        Returns:
            On the last stage [e] fp32 log-probabilities, in nats, of the policy's edges and then
            the reference's; else the hidden states [p + r, 1, h] for the next stage.
        """
        policy_input, reference_input = self._split_received(pack)
        outputs = [self._run(self._chunk("policy"), pack.policy, policy_input)]
        if pack.reference is not None:
            with torch.no_grad():
                outputs.append(self._run(self._chunk("reference"), pack.reference, reference_input))
        return torch.cat(outputs)

    def _run(self, chunk: ChunkModel, tokens: RankTokens, received: Tensor | None) -> Tensor:
        gpt = chunk.gpt
        embedded = None
        if gpt.pre_process:
            embedded = gpt.embedding(
                input_ids=tokens.input_ids[None], position_ids=tokens.position_ids[None]
            )
        else:
            gpt.set_input_tensor(received)
        hidden = gpt.decoder(
            hidden_states=embedded,
            attention_mask=None,
            rotary_pos_emb=rotary_angles(chunk.inv_freq, tokens.position_ids),
            packed_seq_params=tokens.attention,
        )
        if not gpt.post_process:
            return hidden
        if gpt.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self._tensor_group
            )
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self._tensor_group)
        weight = (
            gpt.shared_embedding_or_output_weight()
            if gpt.share_embeddings_and_output_weights
            else gpt.output_layer.weight
        )
        shard = VocabularyShard.of_rank(
            rows=weight.shape[0], vocab_size=chunk.vocab_size, group=self._tensor_group
        )
        edges = tokens.edges
        return edge_logps(hidden.squeeze(1), weight, edges.sources, edges.targets, shard)

    def _split_received(self, pack: RankPack) -> tuple[Tensor | None, Tensor | None]:
        if self._received is None:
            return None, None
        num_policy_tokens = self._local_length(pack.policy)
        policy_input = self._received[:num_policy_tokens]
        # What arrives requires a gradient; the reference's part must not lead back.
        return policy_input, self._received[num_policy_tokens:].detach()

    def _local_length(self, tokens: RankTokens) -> int:
        shards = self._tensor_group.size() if self.config.sequence_parallel else 1
        return tokens.num_tokens // shards

    def _chunk(self, name: str) -> ChunkModel:
        chunk = self._chunks[name]
        assert chunk is not None, "the pack has reference tokens, but there is no reference model"
        return chunk

    # What Megatron's schedules and gradient finalisation ask of a model.

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Takes what the stage before sent: a tensor, or a list of one."""
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def shared_embedding_or_output_weight(self) -> Tensor:
        return self.policy.shared_embedding_or_output_weight()

    def train(self, mode: bool = True) -> nn.Module:
        """The reference stays in eval mode."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The policy's, under the keys of a plain GPTModel; the reference is not saved."""
        return self.policy.sharded_state_dict(*args, **kwargs)
