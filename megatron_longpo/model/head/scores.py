"""The head of training: log-probabilities of edges, and divergences between policy and reference.

Letters: e edges of this rank, the policy's before the reference's; d the policy's places that are
compared with the reference's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_longpo.model.head.divergence import reverse_kl
from megatron_longpo.model.head.final_states import FinalStates, states_of_all_places
from megatron_longpo.model.head.logprobs import edge_logps
from megatron_longpo.parallel.layout import RankEdges, RankPack


def score_pack(
    pack: RankPack,
    policy: FinalStates,
    reference: FinalStates | None,
    *,
    context_group: ProcessGroup,
) -> Tensor:
    """Returns what training reads of a microbatch.

    Args:
        pack: the microbatch.
        policy: gets a gradient.
        reference: gets none; None = the pack has no reference tokens.
        context_group: ranks that hold the other tokens of the pack.

    Returns:
        [e + d] fp32, in nats: log-probabilities of the policy's edges and then the reference's, and
        after them the divergence of each of the policy's places.
    """
    policy_states = policy.whole()
    outputs = [_logps(policy, pack.policy.edges, policy_states)]
    if pack.reference is not None and reference is not None:
        with torch.no_grad():
            reference_states = reference.whole()
            outputs.append(_logps(reference, pack.reference.edges, reference_states))
        taught = pack.policy.divergence
        if taught.num_slots:
            teacher_states = states_of_all_places(
                reference_states, pack.reference.divergence, context_group
            )
            layer = policy.output_layer()
            divergences = reverse_kl(
                policy_states,
                layer.weight,
                taught.sources,
                teacher_states[taught.slots],
                # Backward needs it on this device, which an offloaded parameter has left by then.
                reference.output_layer().weight.detach(),
                layer.shard,
            )
            outputs.append(divergences)
    return torch.cat(outputs)


def _logps(model: FinalStates, edges: RankEdges, states: Tensor) -> Tensor:
    layer = model.output_layer()
    return edge_logps(
        states,
        layer.weight,
        edges.sources,
        edges.targets,
        layer.shard,
        sources_on_host=edges.sources_on_host,
    )
