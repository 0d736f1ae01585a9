"""What an evaluation asks of the head: greedy hits, and how far a base model's predictions are.

Forward only, over chunks of places whose logits live while they are looked at, as in
`logprob_head`; the vocabulary may be sharded over tensor-parallel ranks.

Letters: t tokens, s teacher states, h and g hidden sizes of policy and base, v this rank's share of
the padded vocabulary, e edges, d places, c places of a chunk.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from megatron_longpo.model.head.divergence import CHUNK_BYTES, place_chunks
from megatron_longpo.model.head.logit_rows import row_statistics
from megatron_longpo.model.head.logprobs import (
    VocabularyShard,
    local_columns,
    log_sum_exp,
    log_sum_over,
)
from megatron_longpo.parallel.layout import RankPack

NO_TOKEN = torch.iinfo(torch.int64).max


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseStates:
    """What a base model that is no longer in memory said at a pack's places."""

    states: Tensor
    """[s,g] its final hidden state at every place of the whole pack, by slot."""
    weight: Tensor
    """[v,g] this rank's rows of its output weight, on any device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbePack(RankPack):
    """A microbatch that is looked at, not learned from.

    The last stage gives [2, e + d]: of every edge the log-probability in nats and whether its
    target is what greedy decoding would write; of every place KL(base || policy) in nats and
    whether the two would write the same token. The base is the reference, or `base`.
    """

    base: BaseStates | None = None
    wants_states: bool = False
    """The last stage gives the policy's final hidden states at the places instead, [d, h]."""

    @staticmethod
    def of(
        pack: RankPack, *, base: BaseStates | None = None, wants_states: bool = False
    ) -> ProbePack:
        fields = {field.name: getattr(pack, field.name) for field in dataclasses.fields(RankPack)}
        return ProbePack(**fields, base=base, wants_states=wants_states)


def edge_outcomes(
    hidden: Tensor,
    weight: Tensor,
    sources: Tensor,
    targets: Tensor,
    shard: VocabularyShard,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """What the model says of each edge: how likely its target is, and whether the likeliest.

    Args:
        hidden: [t,h] final hidden states.
        weight: [v,h] this rank's rows of the output weight.
        sources: [e] int64, indices into `hidden`.
        targets: [e] int64 token ids.
        shard: what the rows of `weight` are.
        chunk_bytes: bytes of one chunk's logits in fp32.

    Returns:
        [2,e] in fp32 (fp64 for fp64 inputs), the same on every tensor-parallel rank:
        log-probabilities in nats, as `logprob_head.edge_logps` gives them, and 1 where greedy
        decoding would write the target: of equally likely tokens the first.
    """
    accumulator = torch.promote_types(hidden.dtype, torch.float32)
    outcomes = torch.empty(2, len(sources), dtype=accumulator, device=hidden.device)
    columns = local_columns(targets, shard)
    for chunk in place_chunks(len(sources), weight, chunk_bytes):
        logits = hidden[sources[chunk]] @ weight.T
        normalizers, logps = row_statistics(logits, columns[chunk], num_valid=shard.num_valid)
        if shard.group.size() > 1:
            dist.all_reduce(logps, group=shard.group)
        hits = likeliest_tokens(logits[:, : shard.num_valid], shard) == targets[chunk]
        outcomes[0, chunk] = logps - log_sum_over(normalizers, shard.group)
        outcomes[1, chunk] = hits.to(accumulator)
    return outcomes


def compare_with_base(
    hidden: Tensor,
    weight: Tensor,
    sources: Tensor,
    base_states: Tensor,
    base_weight: Tensor,
    shard: VocabularyShard,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """KL(base || policy) = sum_v q_v (log q_v - log p_v) of each place, and who agrees.

    Args:
        hidden: [t,h] the policy's final hidden states.
        weight: [v,h] this rank's rows of the policy's output weight.
        sources: [d] int64, indices into `hidden`.
        base_states: [d,g] the base's final hidden state of each place.
        base_weight: [v,g] this rank's rows of the base's output weight.
        shard: what the rows of both weights are: the vocabularies must be the same.
        chunk_bytes: bytes of one chunk's logits in fp32.

    Returns:
        [2,d] in fp32 (fp64 for fp64 inputs), the same on every tensor-parallel rank: nats, and 1
        where both models' likeliest tokens are the same.
    """
    accumulator = torch.promote_types(hidden.dtype, torch.float32)
    outcomes = torch.empty(2, len(sources), dtype=accumulator, device=hidden.device)
    for chunk in place_chunks(len(sources), weight, chunk_bytes):
        logits = hidden[sources[chunk]] @ weight[: shard.num_valid].T
        base_logits = base_states[chunk] @ base_weight[: shard.num_valid].T
        agree = likeliest_tokens(logits, shard) == likeliest_tokens(base_logits, shard)
        logps, base_logps = (
            exact - log_sum_exp(exact, shard.group)[:, None]
            for exact in (logits.to(accumulator), base_logits.to(accumulator))
        )
        divergences = (base_logps.exp() * (base_logps - logps)).sum(-1)
        if shard.group.size() > 1:
            dist.all_reduce(divergences, group=shard.group)
        outcomes[0, chunk], outcomes[1, chunk] = divergences, agree.to(accumulator)
    return outcomes


def likeliest_tokens(logits: Tensor, shard: VocabularyShard) -> Tensor:
    """[c, rows that stand for a token] -> [c] token ids over the whole vocabulary."""
    if not shard.num_valid:
        best = logits.new_full(logits.shape[:1], -torch.inf)
        tokens = torch.full_like(best, NO_TOKEN, dtype=torch.int64)
    else:
        # Of equal ones `argmax` gives the first.
        columns = logits.argmax(dim=-1)
        best = logits.gather(1, columns[:, None]).squeeze(1)
        tokens = columns + shard.start
    return _first_of_the_best(best, tokens, shard.group)


def _first_of_the_best(best: Tensor, tokens: Tensor, group: ProcessGroup) -> Tensor:
    if group.size() == 1:
        return tokens
    highest = best.clone()
    dist.all_reduce(highest, op=ReduceOp.MAX, group=group)
    tokens = torch.where(best == highest, tokens, NO_TOKEN)
    dist.all_reduce(tokens, op=ReduceOp.MIN, group=group)
    return tokens
