"""From pair indices to the microbatches that this rank runs."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_longpo.data.catalog import PairCatalog
from megatron_longpo.data.packing import deal, make_pack
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.parallel.layout import RankPack, lay_out_pack


def rank_packs(
    catalog: PairCatalog,
    pairs: Sequence[int],
    groups: Groups,
    *,
    budget_tokens: int,
    context_comm: str,
) -> list[RankPack]:
    """Deals a global batch over data-parallel ranks and lays this rank's microbatches out.

    Every rank of a pipeline, tensor or context group gets the same pairs.
    """
    dealt = deal(catalog.sizes_of(pairs), num_ranks=groups.data.size(), budget_tokens=budget_tokens)
    packs = []
    for microbatch in dealt[groups.data.rank()]:
        trees = [catalog.trees(pairs[index]) for index in microbatch.pairs]
        pack = make_pack(trees, is_filler=microbatch.is_filler)
        packs.append(
            lay_out_pack(
                pack,
                device=groups.device,
                multiple=groups.sizes.tensor if groups.sizes.sequence else 1,
                context_rank=groups.context.rank(),
                context_size=groups.context.size(),
                scatter_heads=context_comm == "a2a",
            )
        )
    return packs
