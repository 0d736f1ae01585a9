"""The notation of pipeline layouts; Megatron's own parser is the judge of it."""

from __future__ import annotations

import pytest
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_longpo.config.pipeline_layout import parse_layout
from megatron_longpo.errors import UserError


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("EttL", (2,)),
        ("Ettt|(tt|)*2tL", (3, 2, 2, 1)),
        ("E|t|t|L", (0, 1, 1, 0)),
        ("Et*3|t*2, tt|(t|t)*2L", (3, 4, 1, 2, 1)),
        ("Et*12|L", (12, 0)),
    ],
)
def test_the_notation_is_megatrons(text: str, split: tuple[int, ...]) -> None:
    assert parse_layout(text) == split
    theirs = PipelineParallelLayerLayout.parse_str_to_list(text.replace(" ", ""))
    assert tuple(stage.count(LayerType.decoder) for stage in theirs) == split


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it must begin with the only E"),
        ("tt|L", "it must begin with the only E"),
        ("Et|EtL", "it must begin with the only E"),
        ("|Et|L", "it must begin with the only E"),
        ("Et|tt", "end with the only L"),
        ("Et||L", "stage 2 has nothing to do. Give it a layer"),
        ("Et|x|L", "x is none of E"),
        ("Ett|mL", "m is none of .*no multi-token prediction"),
        ("E(tt*2L", r"\( is none of E"),
    ],
)
def test_what_is_no_layout_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        parse_layout(text)
    assert "\n" not in str(refused.value) and "parallel.pipeline_layout" in str(refused.value)
