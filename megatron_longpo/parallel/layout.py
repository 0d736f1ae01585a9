"""How the tokens of a forest lie on this rank, and what each of them attends.

`RankTokens` is all that the model sees of a pack. A *run* is a maximal chain of first children:
contiguous in the flat order, so its tokens attend each other in ordinary causal attention. What a
run hangs on, its ancestors, it attends whole. Every tree is thus two kinds of calls to a stock
kernel, square causal ones and full rectangles, and no mask.

Letters: t tokens on this rank, padding included; e edges whose source is on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_longpo.data.packing import Pack
from megatron_longpo.data.tree import NO_PARENT, Forest


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, stop)."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryPiece:
    """Neighbouring queries of one run: each attends `context` whole and the piece causally."""

    queries: Span
    """Of this rank's tokens."""
    own_keys: Span
    """The same tokens among the keys."""
    context: tuple[Span, ...]
    """Keys before the piece, in the order of the row: ancestors, then the run's earlier tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPlan:
    """What attends what. Rides through Megatron's layers as their `packed_seq_params`."""

    pieces: tuple[QueryPiece, ...]
    qkv_format: str = field(default="sbhd", init=False)
    """Megatron then takes our positions as they are, instead of deriving some from lengths."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEdges:
    """Edges whose source token is on this rank."""

    sources: torch.Tensor
    """[e] int64; indices into this rank's tokens."""
    targets: torch.Tensor
    """[e] int64."""
    pairs: torch.Tensor
    """[e] int64."""
    turns: torch.Tensor
    """[e] int64."""
    terms: torch.Tensor
    """[e] int64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankTokens:
    """A forest as one rank holds it."""

    input_ids: torch.Tensor
    """[t] int64; padding is token 0, at the end, attended by nothing and attending nothing."""
    position_ids: torch.Tensor
    """[t] int64."""
    attention: AttentionPlan
    edges: RankEdges

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


def lay_out(forest: Forest, *, multiple: int, device: torch.device) -> RankTokens:
    """Gives a rank its tokens of a forest.

    Args:
        forest: a pack's policy or reference forest.
        multiple: the number of tokens is padded to a multiple of it (sequence parallelism).
        device: where the tensors go.
    """
    padding = -forest.num_tokens % multiple

    def on_device(array: np.ndarray, pad: int = 0) -> torch.Tensor:
        return torch.from_numpy(np.pad(array, (0, pad))).to(device, non_blocking=True)

    return RankTokens(
        input_ids=on_device(forest.input_ids, padding),
        position_ids=on_device(forest.position_ids, padding),
        attention=AttentionPlan(
            pieces=tuple(
                QueryPiece(queries=run, own_keys=run, context=context)
                for run, context in attention_runs(forest)
            )
        ),
        edges=RankEdges(
            sources=on_device(forest.edge_sources),
            targets=on_device(forest.edge_targets),
            pairs=on_device(forest.edge_pairs),
            turns=on_device(forest.edge_turns),
            terms=on_device(forest.edge_terms),
        ),
    )


def attention_runs(forest: Forest) -> list[tuple[Span, tuple[Span, ...]]]:
    """Splits a forest into its runs, each with the spans of its ancestors, root first.

    Neighbouring ancestor spans are one, so that a branch of a tree of depth two has one ancestor
    span: the prefix.
    """
    runs: list[tuple[Span, tuple[Span, ...]]] = []
    # For every segment, the spans of its row's tokens up to and including its own.
    histories: list[tuple[Span, ...]] = []
    for start, length, parent in zip(
        forest.segment_starts.tolist(),
        forest.segment_lengths.tolist(),
        forest.segment_parents.tolist(),
        strict=True,
    ):
        own = Span(start, start + length)
        context = () if parent == NO_PARENT else histories[parent]
        if context and context[-1].stop == start:
            histories.append((*context[:-1], Span(context[-1].start, own.stop)))
            run, run_context = runs[-1]
            runs[-1] = (Span(run.start, own.stop), run_context)
        else:
            histories.append((*context, own))
            runs.append((own, context))
    return runs


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPack:
    """One microbatch as one rank holds it. Letters: N pairs, T most turns among them."""

    policy: RankTokens
    reference: RankTokens | None
    turn_mask: torch.Tensor
    """[N, T] bool; True where the pair has that turn."""
    nll_counts: torch.Tensor
    """[N] int64; tokens of each pair's NLL mean, over all ranks."""
    weights: torch.Tensor
    """[N] int64; 0 for a filler's pair, else 1."""


def lay_out_pack(pack: Pack, *, multiple: int, device: torch.device) -> RankPack:
    """Gives a rank its part of a microbatch; see `lay_out`.

    Policy and reference are padded apart, since a pipeline stage sends them side by side and
    sequence parallelism shards each.
    """
    turns = np.arange(int(pack.turn_counts.max()))
    return RankPack(
        policy=lay_out(pack.policy, multiple=multiple, device=device),
        reference=None
        if pack.reference is None
        else lay_out(pack.reference, multiple=multiple, device=device),
        turn_mask=torch.from_numpy(turns < pack.turn_counts[:, None]).to(device),
        nll_counts=torch.from_numpy(pack.nll_counts).to(device),
        weights=torch.from_numpy(pack.weights).to(device),
    )
