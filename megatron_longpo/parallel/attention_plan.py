"""What the tokens of a forest attend, as a few calls of a stock kernel.

A *run* is a maximal chain of first children. It is contiguous in the flat order, so its tokens
attend each other in ordinary causal attention, and all of them attend all of the run's ancestors.
Every tree is thus square causal blocks and full rectangles, and needs no mask.

Letters: q queries of this rank's kernels, T tokens of the forest.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_longpo.data.trees.forest import NO_PARENT, Forest
from megatron_longpo.parallel.transfer import to_device


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, stop)."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryPiece:
    """Adjacent queries of one run: each attends all of `context` and, causally, the piece."""

    queries: Span
    """Their places among the queries of this rank's kernels."""
    own_keys: Span
    """The places of the same tokens among the keys."""
    context: tuple[Span, ...]
    """Keys before the piece, in the sequence's order: ancestors, then the run's earlier tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenOrder:
    """Places of tokens in the concatenated tokens of several ranks, padding included."""

    all: torch.Tensor
    """[T] int64: of each token of the flat forest, among those of all ranks."""
    inner: torch.Tensor
    """[q] int64: of each token of the ranks that scatter heads, among theirs. The order is that of
    queries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPlan:
    """What attends what. Megatron's layers pass it on as their `packed_seq_params`."""

    pieces: tuple[QueryPiece, ...]
    """Adjacent pieces of queries from the first on, in the order of `order.inner`. Keys are those
    of the flat forest."""
    order: TokenOrder | None
    """None = there is one rank."""
    lengths: tuple[int, ...]
    """Queries of each piece."""
    own_keys: slice | torch.Tensor
    """The pieces' `own_keys`, concatenated: a slice where they are adjacent, else [sum of lengths]
    int64."""
    adds_once: bool
    """Whether every query and every key has at most one part of its gradient from a context."""
    qkv_format: str = field(default="sbhd", init=False)
    """With this value Megatron takes our positions as they are, and derives none from lengths."""

    @staticmethod
    def of(
        pieces: Sequence[QueryPiece], *, order: TokenOrder | None, device: torch.device
    ) -> AttentionPlan:
        """Computes what all layers share, once, and copies its tensors to `device`."""
        joint: list[Span] = []
        for piece in pieces:
            append_span(joint, piece.own_keys)
        if len(joint) > 1:
            own = np.concatenate([np.arange(span.start, span.stop) for span in joint])
            own_keys: slice | torch.Tensor = to_device(own, device)
        else:
            own_keys = slice(joint[0].start, joint[0].stop) if joint else slice(0, 0)
        contexts = sorted(
            (span for piece in pieces for span in piece.context), key=lambda span: span.start
        )
        are_apart = all(one.stop <= next.start for one, next in itertools.pairwise(contexts))
        return AttentionPlan(
            pieces=tuple(pieces),
            order=order,
            lengths=tuple(len(piece.queries) for piece in pieces),
            own_keys=own_keys,
            adds_once=are_apart and all(len(piece.context) <= 1 for piece in pieces),
        )


def append_span(spans: list[Span], span: Span) -> None:
    """Appends a span, or extends the last one if they are adjacent."""
    if not len(span):
        return
    if spans and spans[-1].stop == span.start:
        spans[-1] = Span(spans[-1].start, span.stop)
    else:
        spans.append(span)


def attention_runs(forest: Forest) -> list[tuple[Span, tuple[Span, ...]]]:
    """Splits a forest into its runs, each with the spans of its ancestors, root first.

    Adjacent ancestor spans are joined, so that a branch of a tree of depth two has one ancestor
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


def query_pieces(
    runs: Sequence[tuple[Span, tuple[Span, ...]]], spans: Sequence[Span]
) -> list[QueryPiece]:
    """Returns the parts of each run within these spans, over the keys of the flat forest.

    Args:
        runs: of the forest, each with its ancestors.
        spans: what this rank's kernels see as queries, ascending.
    """
    pieces = []
    num_before = 0
    for span in spans:
        for run, context in runs:
            keys = Span(max(run.start, span.start), min(run.stop, span.stop))
            if keys.start >= keys.stop:
                continue
            earlier = (Span(run.start, keys.start),) if keys.start > run.start else ()
            start = num_before + keys.start - span.start
            pieces.append(
                QueryPiece(
                    queries=Span(start, start + len(keys)),
                    own_keys=keys,
                    context=(*context, *earlier),
                )
            )
        num_before += len(span)
    return pieces
