"""Deals pairs into microbatches over ranks, and lays out this rank's tokens of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_longpo.data.trees.catalog import PairCatalog
from megatron_longpo.data.trees.packing import Microbatch, PairSize, deal, make_pack
from megatron_longpo.data.trees.tree import PairTrees
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.parallel.layout import RankPack, lay_out_pack

MICROBATCHES_A_PART = 4
"""For each data-parallel rank and pipeline stage: enough to balance the ranks and to fill the
pipeline, and few enough that a stop or a crash loses a minute of work."""


class PairSource(Protocol):
    """A catalog of pairs, as dealing and packing use it."""

    def sizes_of(self, pairs: Sequence[int]) -> list[PairSize]: ...

    def trees(self, pair: int) -> PairTrees: ...


def rank_packs(
    catalog: PairSource,
    pairs: Sequence[int],
    groups: Groups,
    *,
    budget_tokens: int,
) -> list[RankPack]:
    """Deals a global batch over data-parallel ranks and lays this rank's microbatches out.

    Every rank of a pipeline, tensor or context group gets the same pairs.
    """
    return [
        lay_out_microbatch(catalog, pairs, microbatch, groups)
        for microbatch in rank_microbatches(catalog, pairs, groups, budget_tokens=budget_tokens)
    ]


def rank_microbatches(
    catalog: PairSource, pairs: Sequence[int], groups: Groups, *, budget_tokens: int
) -> list[Microbatch]:
    """Returns this rank's share of a global batch; its pairs are indices into `pairs`."""
    dealt = deal(
        catalog.sizes_of(pairs),
        num_ranks=groups.data.size(),
        budget_tokens=budget_tokens,
        # Megatron's interleaved schedule takes microbatches in groups of the pipeline's size.
        multiple=groups.sizes.pipeline if groups.sizes.virtual_pipeline else 1,
    )
    return dealt[groups.data.rank()]


def lay_out_microbatch(
    catalog: PairSource,
    pairs: Sequence[int],
    microbatch: Microbatch,
    groups: Groups,
) -> RankPack:
    """Reads a microbatch's pairs and gives this rank its tokens of them."""
    trees = [catalog.trees(pairs[index]) for index in microbatch.pairs]
    return lay_out_pack(
        make_pack(trees, is_filler=microbatch.is_filler),
        device=groups.device,
        multiple=groups.sizes.tensor if groups.sizes.sequence else 1,
        context_rank=groups.context.rank(),
        context_size=groups.context.size(),
        context_inner=groups.sizes.context_inner,
    )


def split_parts(
    pairs: Sequence[int], tokens: Sequence[int], groups: Groups, *, budget_tokens: int
) -> list[list[int]]:
    """Cuts pairs that are only scored into consecutive parts, each a few microbatches a rank."""
    num_ranks = groups.data.size() * groups.pipeline.size()
    return cut(pairs, tokens, part_tokens=MICROBATCHES_A_PART * num_ranks * budget_tokens)


def cut(pairs: Sequence[int], tokens: Sequence[int], *, part_tokens: int) -> list[list[int]]:
    """Cuts pairs into consecutive parts; all but the last have at least `part_tokens` tokens."""
    parts: list[list[int]] = []
    room = 0
    for pair, size in zip(pairs, tokens, strict=True):
        if room <= 0:
            parts.append([])
            room = part_tokens
        parts[-1].append(pair)
        room -= size
    return parts


def read_ahead(
    catalog: PairCatalog, pairs: Sequence[int], groups: Groups, *, budget_tokens: int
) -> None:
    """Reads the rows that `rank_packs` will need for these pairs into memory."""
    share = rank_microbatches(catalog, pairs, groups, budget_tokens=budget_tokens)
    catalog.read_ahead([pairs[index] for microbatch in share for index in microbatch.pairs])
