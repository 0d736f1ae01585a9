"""Policy and reference in one module: the reference rides in the policy's pipeline pass.

Letters: p and r policy and reference tokens on this rank, padding included; h hidden size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_longpo.model.activation_offload import ActivationOffload
from megatron_longpo.model.head.final_states import FinalStates, Head, OutputLayer
from megatron_longpo.model.head.scores import score_pack
from megatron_longpo.model.lora import adapter_state, adapters, adapters_off, load_adapter_state
from megatron_longpo.model.offload import OffloadedWeights
from megatron_longpo.model.rope import rotary_angles
from megatron_longpo.parallel.layout import RankPack, RankTokens


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkModel:
    """One pipeline chunk of a language model, with what GPTModel does not know about itself."""

    gpt: GPTModel
    inv_freq: Tensor
    """[head_dim / 2] fp32, radians a position. It is no buffer, which `.bfloat16()` would round."""
    vocab_size: int
    """Token ids that exist; the embedding's further rows are padding."""


class LongPOModel(MegatronModule):
    """A pipeline chunk of the policy and, beside it, the same layers of the frozen reference.

    Pipeline stages send each other one tensor, `[policy tokens | reference tokens]`; every stage
    knows both lengths from the pack. The policy runs with gradients, the reference without.
    Megatron sees the policy: its config, its embeddings and, in checkpoints, its parameters under
    the keys of a plain GPTModel, or only its adapters if it has some. A reference on the policy's
    own GPTModel is that model with its adapters off.
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
        """`activations` stores what the policy's layers keep for backward; None = on the device."""
        super().__init__(config=policy.gpt.config)
        self.policy = policy.gpt
        self.reference: GPTModel | None = None
        if reference is not None and reference.gpt is not policy.gpt:
            self.reference = reference.gpt
        self._chunks = {"policy": policy, "reference": reference}
        self._tensor_group = tensor_group
        self._score: Head = partial(score_pack, context_group=context_group)
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

    def forward(self, pack: RankPack, head: Head | None = None) -> Tensor:
        """Runs this stage.

        Args:
            pack: the microbatch.
            head: what the last stage makes of the final states; None = `scores.score_pack`.

        Returns:
            On the last stage what `head` returns, else the hidden states [p + r, 1, h] for the next
            stage.
        """
        read = head or self._score
        policy_input, reference_input = self._split_received(pack)
        policy = self._chunk("policy")
        policy_hidden = self._hidden(policy, pack.policy, policy_input)
        if pack.reference is None:
            if not self.post_process:
                return policy_hidden
            return read(pack, self._final(policy, policy_hidden), None)
        reference = self._chunk("reference")
        with self._reference_at_hand():
            with torch.no_grad(), adapters_off(reference.gpt):
                reference_hidden = self._hidden(reference, pack.reference, reference_input)
            if not self.post_process:
                return torch.cat([policy_hidden, reference_hidden])
            return read(
                pack,
                self._final(policy, policy_hidden),
                self._final(reference, reference_hidden),
            )

    def _final(self, chunk: ChunkModel, hidden: Tensor) -> FinalStates:
        return FinalStates(
            hidden=hidden,
            gpt=chunk.gpt,
            vocab_size=chunk.vocab_size,
            tensor_group=self._tensor_group,
        )

    def offload_reference(self) -> None:
        """Moves the reference's weights to CPU memory; they are on the device while it runs."""
        assert self.reference is not None
        device = next(self.policy.parameters()).device
        self._offloaded = OffloadedWeights(self.reference, device)

    def _reference_at_hand(self) -> AbstractContextManager[None]:
        return nullcontext() if self._offloaded is None else self._offloaded.on_device()

    def _hidden(self, chunk: ChunkModel, tokens: RankTokens, received: Tensor | None) -> Tensor:
        """Runs one model's layers of this stage -> [tokens of this rank, 1, h]."""
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

    def output_weight(self) -> Tensor:
        """Returns this rank's rows of the policy's output weight; the last stage has one."""
        policy = self._chunk("policy")
        return OutputLayer.of(
            policy.gpt, vocab_size=policy.vocab_size, tensor_group=self._tensor_group
        ).weight

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
        """Sets the policy's mode; the reference stays in eval mode."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns the policy's state, under the keys of a plain GPTModel, without the reference.

        Of a policy with adapters it returns those alone.
        """
        if self.has_adapters:
            return adapter_state(self.policy)
        return self.policy.sharded_state_dict(*args, **kwargs)

    def load_saved(self, state: dict[str, Any]) -> None:
        """Writes a state that was loaded for `sharded_state_dict`."""
        if self.has_adapters:
            load_adapter_state(self.policy, state)
        else:
            self.policy.load_state_dict(state, strict=True)

    @property
    def has_adapters(self) -> bool:
        return any(True for _ in adapters(self.policy))
