"""How layers are split into stages."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_longpo.parallel.stages import (
    even_split,
    like_split,
    megatron_layout,
)

quick = settings(max_examples=60, deadline=None, derandomize=True)
splits = st.lists(st.integers(1, 9), min_size=1, max_size=8).map(tuple)


@quick
@given(st.integers(1, 200), st.integers(1, 16))
def test_an_even_split_differs_by_one_and_ends_with_the_fewest(layers: int, stages: int) -> None:
    split = even_split(layers, stages)
    assert len(split) == stages and sum(split) == layers
    assert max(split) - min(split) <= 1 and list(split) == sorted(split, reverse=True)


@quick
@given(splits, st.integers(1, 60))
def test_another_depth_is_split_in_proportion(split: tuple[int, ...], layers: int) -> None:
    other = like_split(layers, split)
    assert len(other) == len(split) and sum(other) == layers and min(other) >= 0
    assert all(
        abs(theirs - layers * ours / sum(split)) <= 1
        for ours, theirs in zip(split, other, strict=True)
    )
    assert like_split(sum(split), split) == split


@quick
@given(splits, st.booleans(), st.booleans())
def test_megatron_reads_our_split(
    split: tuple[int, ...], bare_first: bool, bare_last: bool
) -> None:
    split = (0,) * bare_first + split + (0,) * bare_last
    layout = megatron_layout(split)
    if layout is None:
        assert len(set(split)) == 1
        return
    theirs = PipelineParallelLayerLayout(layout, len(split))
    theirs.validate_layer_layout(sum(split), 0)
    for rank, layers in enumerate(split):
        assert theirs.layout[rank][0].count(LayerType.decoder) == layers
