"""Policy and reference in one module: the reference rides in the policy's pipeline pass.

Letters: p and r policy and reference tokens on this rank, padding included; t those of one of them;
h hidden size; e edges of this rank, the policy's before the reference's; d the policy's places that
are compared with the reference's.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_longpo.model.activation_offload import ActivationOffload
from megatron_longpo.model.head.divergence import reverse_kl
from megatron_longpo.model.head.logprobs import VocabularyShard, edge_logps
from megatron_longpo.model.head.probe import ProbePack, compare_with_base, edge_outcomes
from megatron_longpo.model.lora import adapter_state, adapters, adapters_off, load_adapter_state
from megatron_longpo.model.offload import OffloadedWeights
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
    checkpoints, its parameters under the keys of a plain GPTModel, or its adapters where it has
    some. A reference on the policy's own GPTModel is that model with its adapters off.
    """

    def __init__(
        self,
        *,
        policy: ChunkModel,
        reference: ChunkModel | None,
        tensor_group: ProcessGroup,
        context_group: ProcessGroup,
        activations: ActivationOffload | None = None,
    ) -> None:
        """`activations` has what the policy's layers keep for backward; None = the device has."""
        super().__init__(config=policy.gpt.config)
        self.policy = policy.gpt
        self.reference: GPTModel | None = None
        if reference is not None and reference.gpt is not policy.gpt:
            self.reference = reference.gpt
        self._chunks = {"policy": policy, "reference": reference}
        self._tensor_group = tensor_group
        self._context_group = context_group
        self._activations = activations
        self._received: Tensor | None = None
        self._offloaded: OffloadedWeights | None = None
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
            On the last stage [e + d] fp32, in nats: log-probabilities of the policy's edges and
            then the reference's, and after them the divergence of each of the policy's places; of
            a `ProbePack` what it asks for. Else the hidden states [p + r, 1, h] for the next stage.
        """
        policy_input, reference_input = self._split_received(pack)
        policy = self._chunk("policy")
        policy_hidden = self._hidden(policy, pack.policy, policy_input)
        if pack.reference is None:
            if not self.post_process:
                return policy_hidden
            return self._read(pack, self._whole(policy, policy_hidden), None)
        reference = self._chunk("reference")
        with self._reference_at_hand():
            with torch.no_grad(), adapters_off(reference.gpt):
                reference_hidden = self._hidden(reference, pack.reference, reference_input)
            if not self.post_process:
                return torch.cat([policy_hidden, reference_hidden])
            return self._read(pack, self._whole(policy, policy_hidden), reference_hidden)

    def _read(
        self, pack: RankPack, policy_hidden: Tensor, reference_hidden: Tensor | None
    ) -> Tensor:
        """What the last stage gives: from the policy's whole final states and, as this rank has
        them, the reference's."""
        policy = self._chunk("policy")
        if isinstance(pack, ProbePack):
            return self._probe(pack, policy_hidden, reference_hidden)
        outputs = [self._logps(policy, pack.policy, policy_hidden)]
        if pack.reference is not None and reference_hidden is not None:
            with torch.no_grad():
                reference = self._chunk("reference")
                reference_hidden = self._whole(reference, reference_hidden)
                outputs.append(self._logps(reference, pack.reference, reference_hidden))
            if pack.policy.divergence.num_slots:
                outputs.append(self._divergence(pack, policy_hidden, reference_hidden))
        return torch.cat(outputs)

    def _probe(
        self, pack: ProbePack, policy_hidden: Tensor, reference_hidden: Tensor | None
    ) -> Tensor:
        """What a `ProbePack` asks for."""
        places, edges = pack.policy.divergence, pack.policy.edges
        if pack.wants_states:
            return policy_hidden[places.sources]
        policy = self._chunk("policy")
        weight, shard = self._head(policy)
        outputs = [edge_outcomes(policy_hidden, weight, edges.sources, edges.targets, shard)]
        if places.num_slots:
            if reference_hidden is not None:
                reference = self._chunk("reference")
                base_states = self._teacher_states(pack, self._whole(reference, reference_hidden))
                base_weight, _ = self._head(reference)
            else:
                assert pack.base is not None, "nothing to compare with"
                base_states, base_weight = pack.base.states, pack.base.weight
            compared = compare_with_base(
                policy_hidden,
                weight,
                places.sources,
                base_states[places.slots].to(weight.dtype),
                base_weight.to(weight),
                shard,
            )
            outputs.append(compared)
        return torch.cat(outputs, dim=1)

    def offload_reference(self) -> None:
        """From now on the reference's weights are on the device only while it runs."""
        assert self.reference is not None
        device = next(self.policy.parameters()).device
        self._offloaded = OffloadedWeights(self.reference, device)

    def _reference_at_hand(self) -> AbstractContextManager[None]:
        return nullcontext() if self._offloaded is None else self._offloaded.on_device()

    def _hidden(self, chunk: ChunkModel, tokens: RankTokens, received: Tensor | None) -> Tensor:
        """Hidden states after this stage, [tokens of this rank, 1, h]."""
        gpt = chunk.gpt
        embedded = None
        if gpt.pre_process:
            embedded = gpt.embedding(
                input_ids=tokens.input_ids[None], position_ids=tokens.position_ids[None]
            )
        else:
            gpt.set_input_tensor(received)
        angles = rotary_angles(chunk.inv_freq, tokens.position_ids)
        with self._offloading(gpt, angles):
            return gpt.decoder(
                hidden_states=embedded,
                attention_mask=None,
                rotary_pos_emb=angles,
                packed_seq_params=tokens.attention,
            )

    def _offloading(self, gpt: GPTModel, angles: Tensor) -> AbstractContextManager[None]:
        if self._activations is None or not torch.is_grad_enabled():
            return nullcontext()
        # All layers keep the same angles.
        return self._activations.forward_pass(gpt, keep=[angles])

    def _whole(self, chunk: ChunkModel, hidden: Tensor) -> Tensor:
        """Final states of all this context rank's tokens, [t, h], on every tensor rank.

        A head's gradient is a tensor rank's part of a sum, which backward adds up here, once.
        """
        if chunk.gpt.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self._tensor_group
            )
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self._tensor_group)
        return hidden.squeeze(1)

    def _logps(self, chunk: ChunkModel, tokens: RankTokens, hidden: Tensor) -> Tensor:
        edges = tokens.edges
        weight, shard = self._head(chunk)
        return edge_logps(
            hidden,
            weight,
            edges.sources,
            edges.targets,
            shard,
            sources_on_host=edges.sources_on_host,
        )

    def _divergence(
        self, pack: RankPack, policy_hidden: Tensor, reference_hidden: Tensor
    ) -> Tensor:
        """KL of policy and reference at this rank's places, [d]."""
        taught = pack.policy.divergence
        states = self._teacher_states(pack, reference_hidden)
        weight, shard = self._head(self._chunk("policy"))
        reference_weight, _ = self._head(self._chunk("reference"))
        return reverse_kl(
            policy_hidden,
            weight,
            taught.sources,
            states[taught.slots],
            # Backward needs it on this device, which an offloaded parameter has left by then.
            reference_weight.detach(),
            shard,
        )

    def _teacher_states(self, pack: RankPack, reference_hidden: Tensor) -> Tensor:
        """The reference's final states at all places of the pack, by slot.

        The same place lies on other context-parallel ranks in the short row than in the long one,
        so the reference's states there, answers alone, go to all of them.
        """
        assert pack.reference is not None
        teaching = pack.reference.divergence
        states = reference_hidden.new_zeros(teaching.num_slots, reference_hidden.shape[1])
        states[teaching.slots] = reference_hidden[teaching.sources]
        if self._context_group.size() > 1:
            dist.all_reduce(states, group=self._context_group)
        return states

    def output_weight(self) -> Tensor:
        """This rank's rows of the policy's output weight; the last stage has one."""
        weight, _ = self._head(self._chunk("policy"))
        return weight

    def _head(self, chunk: ChunkModel) -> tuple[Tensor, VocabularyShard]:
        """This rank's rows of the output weight, and the token ids that they stand for."""
        gpt = chunk.gpt
        _await_parameters(gpt.output_layer)
        weight = (
            gpt.shared_embedding_or_output_weight()
            if gpt.share_embeddings_and_output_weights
            else gpt.output_layer.weight
        )
        shard = VocabularyShard.of_rank(
            rows=weight.shape[0], vocab_size=chunk.vocab_size, group=self._tensor_group
        )
        return weight, shard

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
        """The policy's, under the keys of a plain GPTModel; the reference is not saved.

        Of a policy with adapters they alone are saved.
        """
        if self.has_adapters:
            return adapter_state(self.policy)
        return self.policy.sharded_state_dict(*args, **kwargs)

    def load_saved(self, state: dict[str, Any]) -> None:
        """Writes what was loaded by `sharded_state_dict`."""
        if self.has_adapters:
            load_adapter_state(self.policy, state)
        else:
            self.policy.load_state_dict(state, strict=True)

    @property
    def has_adapters(self) -> bool:
        return any(True for _ in adapters(self.policy))


def _await_parameters(module: nn.Module) -> None:
    """Does before a module's weights are read what calling the module would have done first.

    Megatron's DDP waits in forward pre-hooks for weights that are still being gathered
    (`optimizer.overlap_param_gather`), and the output layer's own forward never runs here.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
