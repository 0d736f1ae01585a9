"""Greedy hits, and divergences from a base model, without ever building all logits.

Both run forward only, over chunks of places whose logits are in memory only while they are read, as
in logprobs.py. The vocabulary may be sharded over tensor-parallel ranks.

Letters: t tokens, h and g hidden sizes of policy and base, v this rank's share of the padded
vocabulary, e edges, d places, c places of a chunk.
"""

from __future__ import annotations

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

NO_TOKEN = torch.iinfo(torch.int64).max
"""In the place of a token id, larger than all of them."""


def edge_outcomes(
    hidden: Tensor,
    weight: Tensor,
    sources: Tensor,
    targets: Tensor,
    shard: VocabularyShard,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Returns how likely each edge's target is, and whether it is the likeliest token.

    Args:
        hidden: [t,h] final hidden states.
        weight: [v,h] this rank's rows of the output weight.
        sources: [e] int64, indices into `hidden`.
        targets: [e] int64 token ids.
        shard: what the rows of `weight` are.
        chunk_bytes: bytes of one chunk's logits in fp32.

    Returns:
        [2,e] in fp32 (fp64 for fp64 inputs), the same on every tensor-parallel rank:
        log-probabilities in nats, as `logprobs.edge_logps` gives them, and 1 where greedy decoding
        would write the target: of equally likely tokens the first.
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
    """Returns KL(base || policy) = sum_v q_v (log q_v - log p_v) of each place, and agreements.

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
    """Finds the likeliest token ids of the whole vocabulary, [c, own tokens] -> [c]."""
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
