"""What an evaluation asks of a model's last stage: packs, and the heads that read them.

Letters: t policy tokens on this rank, e its edges, d its places, s places of the whole pack, h and
g hidden sizes of policy and base, v this rank's rows of the padded vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_longpo.model.head.final_states import FinalStates, states_of_all_places
from megatron_longpo.model.head.probe import compare_with_base, edge_outcomes
from megatron_longpo.parallel.layout import RankPack


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseStates:
    """What a base model that is no longer in memory predicted at a pack's places."""

    states: Tensor
    """[s,g] its final hidden state at every place of the whole pack, by slot."""
    weight: Tensor
    """[v,g] this rank's rows of its output weight, on any device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbePack(RankPack):
    """A microbatch that is scored and not trained on."""

    base: BaseStates | None = None
    """What the policy is compared with; None = the pack's reference."""

    @staticmethod
    def of(pack: RankPack, *, base: BaseStates | None = None) -> ProbePack:
        """Returns the pack with a base."""
        fields = {field.name: getattr(pack, field.name) for field in dataclasses.fields(RankPack)}
        return ProbePack(**fields, base=base)


def probe(
    pack: ProbePack,
    policy: FinalStates,
    reference: FinalStates | None,
    *,
    context_group: ProcessGroup,
) -> Tensor:
    """Returns what an evaluation reads of a microbatch.

    Args:
        pack: the microbatch.
        policy: the model that is evaluated.
        reference: the base, unless the pack has one; None = the pack has no reference tokens.
        context_group: ranks that hold the other tokens of the pack.

    Returns:
        [2, e + d]. For every edge: the log-probability in nats, and 1 where its target is the token
        that greedy decoding would write. For every place: KL(base || policy) in nats, and 1 where
        both would write the same token.
    """
    places, edges = pack.policy.divergence, pack.policy.edges
    states, layer = policy.whole(), policy.output_layer()
    outputs = [edge_outcomes(states, layer.weight, edges.sources, edges.targets, layer.shard)]
    if places.num_slots:
        base = _base_states(pack, reference, context_group)
        compared = compare_with_base(
            states,
            layer.weight,
            places.sources,
            base.states[places.slots].to(layer.weight.dtype),
            base.weight.to(layer.weight),
            layer.shard,
        )
        outputs.append(compared)
    return torch.cat(outputs, dim=1)


def policy_states(pack: RankPack, policy: FinalStates, reference: FinalStates | None) -> Tensor:
    """Returns the policy's final hidden states at this rank's places, [d, h]."""
    return policy.whole()[pack.policy.divergence.sources]


def _base_states(
    pack: ProbePack, reference: FinalStates | None, context_group: ProcessGroup
) -> BaseStates:
    if reference is None:
        assert pack.base is not None, "nothing to compare with"
        return pack.base
    assert pack.reference is not None
    states = states_of_all_places(reference.whole(), pack.reference.divergence, context_group)
    return BaseStates(states=states, weight=reference.output_layer().weight)
